"""Memory of the largest jobs of a build, from shapes: what each holds at its peak, in bytes.

The terms follow the code of the jobs; docs/plan.md says what was measured of them. Nothing here imports torch but
`gpu_bytes`: memory is asked for whenever a build is planned.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from requant.config import Calibration, Tuning
from requant.schemes import Scheme
from requant.shapes import BlockShapes, ModelShapes

if TYPE_CHECKING:
    from requant.structure import Kind, Structure

# Constants of the modules that tune, which import torch (tests hold these against them): fused.DENSE_ACTIVATIONS,
# routed.ROW_MULTIPLE, attention.LONGEST_SHORT, stacks.LARGEST_PART.
DENSE_ACTIVATIONS, ROW_MULTIPLE, LONGEST_SHORT, LARGEST_PART = 1.9, 32, 512, 2**31
# What a job has before it has read a tensor: Python, torch, transformers; and with the tuner and its compiled loops.
BASE, TUNER_BASE = 650_000_000, 850_000_000
# Samples that `routing.observe` runs at a time.
PASS_SAMPLES = 8
FLOAT32_BYTES = 4
# Float32 logits of two models, and float64 tensors of that shape at the peak of `evaluate.Tally.add`.
LOGIT_BYTES = 2 * 4 + 5 * 8
# A score of attention over few tokens: float32, its share in BF16, and the gradients of both.
SHORT_SCORE_BYTES = 2 * (4 + 2)
# A score in torch's attention on a CPU (measured), which holds all of them where keys and values differ in width: MLA.
SCORE_BYTES = 12


def gpu_bytes(structure: Structure, calibration: Calibration, scheme: Scheme, tuning: Tuning) -> int:
    """Peak of a GPU that tunes the largest block (`fused.peak_bytes`)."""
    from requant import fused

    tokens = min(tuning.batch_size, calibration.nsamples) * calibration.seqlen
    choices = structure.experts_per_token
    return max(fused.peak_bytes(kind.module, tokens, choices, scheme, tuning.iters) for kind in structure.kinds)


def cpu_bytes(
    structure: Structure | ModelShapes, calibration: Calibration, scheme: Scheme, tuning: Tuning
) -> dict[str, int]:
    """Peak of the jobs that hold a block or a model on the CPU, by the name of their rule."""
    config, length = structure.config, calibration.seqlen
    a_sample = 2 * length * config["hidden_size"]
    states, heldout = calibration.nsamples * a_sample, calibration.heldout.nsamples * a_sample
    passing = max(2 * kind.elements + pass_bytes(structure, kind, calibration) for kind in structure.kinds)
    rounding = max(rounding_bytes(kind, scheme) for kind in structure.kinds) if scheme.quantizes else 0
    if scheme.quantizes:
        tuned = max(quantize_bytes(structure, kind, calibration, scheme, tuning) for kind in structure.kinds)
        made = {"quantize": TUNER_BASE + 3 * states + heldout + tuned}
    else:
        made = {"copy_block": BASE + 2 * max(kind.elements for kind in structure.kinds)}
    head = (2 * config["hidden_size"] + LOGIT_BYTES * length) * config["vocab_size"]
    return {
        "reference": BASE + 2 * (states + heldout) + passing,
        **made,
        "evaluate": BASE + states + 4 * heldout + max(passing, rounding, head),
        "benchmark": BASE + 2 * (structure.parameters - structure.drafting),
    }


def pass_bytes(structure: Structure | ModelShapes, kind: Kind | BlockShapes, calibration: Calibration) -> int:
    """Activations at the widest place of a pass of a block of that kind: an MLP or attention of some samples."""
    tokens = min(PASS_SAMPLES, calibration.nsamples) * calibration.seqlen
    dense = [shape for name, shape in kind.linear_shapes.items() if ".experts." not in name]
    routed = [shape for name, shape in kind.linear_shapes.items() if ".experts." in name]
    widest = 3 * tokens * max(out for out, _ in dense)
    if routed:
        rows = tokens * structure.experts_per_token // kind.experts
        widest = max(widest, rows * 3 * max(out for out, _ in routed))
    attention = score_bytes(structure, min(PASS_SAMPLES, calibration.nsamples), calibration.seqlen)
    return max(2 * widest, attention) + 4 * tokens * structure.config["hidden_size"]


def score_bytes(structure: Structure | ModelShapes, samples: int, length: int) -> int:
    """What attention over samples of `length` tokens holds of its scores on a CPU, outside of the tuner's own."""
    differ = bool(structure.config.get("kv_lora_rank"))
    return SCORE_BYTES * samples * structure.config["num_attention_heads"] * length**2 if differ else 0


def quantize_bytes(
    structure: Structure | ModelShapes,
    kind: Kind | BlockShapes,
    calibration: Calibration,
    scheme: Scheme,
    tuning: Tuning,
) -> int:
    """What `quantize` holds of a block of that kind at its peak: while it tunes, or when it runs what it ships.

    Tuning on a CPU (`stacks.Stack`), every weight has its BF16 value twice, as in the source and as it is rounded
    now, its offset and its best code; the source's block stays for comparison. On top of that come a step's gradient
    and activations, or the values of the best codes of a stack, made by way of float32, or those of all stacks. Then
    rounded weights, packed ones and the block decoded from them stand side by side.
    """
    source = 2 * kind.elements
    weights = sum(out * width for out, width in kind.linear_shapes.values())
    packed = weights * scheme.weight_bits // 8
    shipped = 2 * source + 2 * weights + packed + pass_bytes(structure, kind, calibration)
    if not tuning.iters or tuning.device != "cpu":
        return shipped
    counter = counter_bytes(tuning.iters)
    a_weight = 2 + 2 + counter + 1 + ((1 if scheme.is_nvfp4 else 2) * counter + 2) / scheme.group_size
    dense = [out * width for name, (out, width) in kind.linear_shapes.items() if ".experts." not in name]
    stack = max([*dense, 2 * kind.expert_elements // 3])
    a_step = 2 * stack + step_bytes(structure, kind, calibration, tuning)
    kept = 2 * stack + 2 * FLOAT32_BYTES * min(stack, LARGEST_PART // 32)
    return max(shipped, source + int(weights * a_weight) + max(a_step, kept, 2 * weights))


def rounding_bytes(kind: Kind | BlockShapes, scheme: Scheme) -> int:
    """A block beside itself as it is rounded plainly, and its packed tensors, of which the file is mapped."""
    weights = sum(out * width for out, width in kind.linear_shapes.values())
    return 2 * kind.elements + 2 * weights + weights * scheme.weight_bits // 8


def counter_bytes(iters: int) -> int:
    """Bytes of an offset while it is tuned (`stacks.Schedule.dtype`)."""
    return 2 if iters * (iters + 1) // 2 < 2**15 else 4


def step_bytes(
    structure: Structure | ModelShapes, kind: Kind | BlockShapes, calibration: Calibration, tuning: Tuning
) -> int:
    """Activations that a tuning step leaves for its backward pass (as in `fused.peak_bytes`), and short attention's."""
    config, samples = structure.config, min(tuning.batch_size, calibration.nsamples)
    tokens = samples * calibration.seqlen
    dense = [shape for name, shape in kind.linear_shapes.items() if ".experts." not in name]
    elements = DENSE_ACTIVATIONS * tokens * sum(out + width for out, width in dense)
    if kind.experts:
        inner = kind.expert_elements // (3 * kind.experts * config["hidden_size"])
        rows = tokens * structure.experts_per_token + kind.experts * ROW_MULTIPLE
        elements += tokens * config["hidden_size"] + rows * (3 * config["hidden_size"] + 6 * inner)
    if calibration.seqlen > LONGEST_SHORT:
        return int(2 * elements) + score_bytes(structure, samples, calibration.seqlen)
    return int(2 * elements) + SHORT_SCORE_BYTES * samples * config["num_attention_heads"] * calibration.seqlen**2

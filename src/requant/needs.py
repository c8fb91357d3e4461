"""What jobs ask of a cluster: memory and run time by rule, from shapes alone: it is asked whenever a build is planned.

Memory of jobs that hold a block or a model is the plan's (`requant.memory`), the time of passes and of tuning that of
the plan's model (`requant.duration`). The other figures are bounds; docs/cluster.md says where each comes from.
"""

from math import ceil
from typing import NamedTuple

from requant.config import Calibration, Release, Target
from requant.duration import Rates, modelled_seconds
from requant.memory import BASE, cpu_bytes
from requant.schemes import SCHEMES
from requant.shapes import ModelShapes, pass_work

# The plan's memory was within 18 % of measured jobs.
MARGIN = 1.2
# After an attempt that may have ended for want of it, a job gets so many times the memory, and the time.
MORE_MEMORY, MORE_TIME = 1.5, 2
# A modelled time is one of the machine that the rates were fitted to; a job may take so many times as long.
SLACK = 2
# Any job may take this long: to start on a busy node, to import torch from a shared disk.
START_SECONDS = 600
# Read and written by each of many jobs on one file system, in bytes a second: assumed, a tenth of a fast one's.
FILE_RATE = 100e6
# A download from the hub, likewise.
DOWNLOAD_RATE = 10e6
# A job that does not import torch: the largest measured was a picture, with 170 MB.
PLAIN = 300_000_000
# Tokenized text, in bytes a byte of it: Python's integers, four bytes of text a token.
TOKENIZED = 20
# Verification of a weight, on one thread of the machine of the CPU's rates: 0.14 to 0.16 us measured; and bytes of one
# in the largest Linear: its source, its packed tensors, the pages of files that these are mapped from; 4 to 5 measured.
VERIFY_SECONDS, VERIFY_BYTES = 0.16e-6, 6
# Plain rounding of a weight and its decoding, likewise: 0.06 us the rounding.
ROUND_SECONDS = 0.15e-6
# A packed weight with its scales, at most, as a multiple of its bits: NVFP4 has 8 bits of scale for 16 weights of 4.
SCALES = 1.125
# What asks a model and what it is asked: lm-eval, an engine's requests. Assumed; the largest job measured, a benchmark
# of the embedded model as it is served, took 1.15 GB in two processes.
ASKING = 1_000_000_000
# The host memory of an engine that has its weights on GPUs: assumed.
ENGINE_BYTES = 16_000_000_000
# Serving and benchmarks: as long as what they ask takes, which no model of time here knows.
SERVING_SECONDS, BENCHMARK_SECONDS = 900, 7200
# The two Snakemake processes around a submitted job, each of which plans it: bytes of one with the executors' plugins
# (272 MB measured), and of one a tensor of the model (benchmarks/results/planning.json).
PLANNER, PLANNER_TENSOR = 280_000_000, 1_700


class Need(NamedTuple):
    """What a job takes: bytes at its peak, and seconds as far as they are known."""

    bytes: int
    seconds: float = 0.0


def memory_mb(need: Need, tensors: int, attempt: int) -> int:
    """MB to ask for: `need`, and if the job is submitted the processes around it, which plan a model of `tensors`."""
    around = 2 * (PLANNER + PLANNER_TENSOR * tensors) if tensors else 0
    return ceil((MARGIN * need.bytes + around) * MORE_MEMORY ** (attempt - 1) / 1e6)


def run_minutes(need: Need, attempt: int) -> int:
    """Minutes to ask for."""
    return ceil((START_SECONDS + SLACK * need.seconds) * MORE_TIME ** (attempt - 1) / 60)


def file_need(size: int, rate: float = FILE_RATE) -> Need:
    """Of a job that reads a file of `size` bytes."""
    return Need(PLAIN, size / rate)


def text_need(size: int) -> Need:
    """Of `calibrate`, over texts of `size` bytes in all."""
    return Need(BASE + TOKENIZED * size, size / (FILE_RATE / 100))


def model_needs(model: ModelShapes, stored: int, calibration: Calibration, rates: Rates) -> dict[str, Need]:
    """Of the jobs on a model and a calibration, by rule. stored: bytes of the shards that it is read from."""
    release = Release(model="", scheme="BF16")
    memory = cpu_bytes(model, calibration, SCHEMES[release.scheme], release.tuning)
    states = _states(model, calibration)
    block = max(2 * kind.elements for kind in model.kinds)
    tokens = (calibration.nsamples + calibration.heldout.nsamples) * calibration.seqlen
    longest = max(pass_work(kind, model.config, tokens, calibration.seqlen) for kind in model.kinds)
    one_pass = Need(memory["reference"], longest * rates.pass_operation + (block + 2 * states) / FILE_RATE)
    embedding = 2 * model.config["vocab_size"] * model.config["hidden_size"]
    heldout = _heldout_seconds(model, calibration, rates) + (stored + model.blocks * states) / FILE_RATE
    return {
        "embed": Need(BASE + 2 * embedding + 2 * states, (embedding + states) / FILE_RATE),
        "reference": one_pass,
        "observe": one_pass,
        "prune_evaluate": Need(memory["evaluate"], heldout),
        "benchmark_source": Need(memory["benchmark"] + ASKING, BENCHMARK_SECONDS + stored / FILE_RATE),
    }


def release_needs(
    model: ModelShapes,
    stored: int,
    settings: Release,
    calibration: Calibration,
    target: Target,
    first_blocks: int,
    rates: Rates,
    chain_rates: Rates,
) -> dict[str, Need]:
    """Of the jobs of a release, by rule. model: the release's, pruned if it is; stored: bytes of its source's shards.

    first_blocks: of the load test. rates: of the device that tunes; chain_rates: of that of all other passes.
    """
    scheme, tuning = SCHEMES[settings.scheme], settings.tuning
    memory = cpu_bytes(model, calibration, scheme, tuning)
    states = _states(model, calibration)
    weights = sum(len(kind.blocks) * _linear_elements(kind) for kind in model.kinds)
    largest = max(2 * kind.elements for kind in model.kinds)
    released = 2 * (model.parameters - weights) + int(weights * scheme.weight_bits / 8 * SCALES)
    outside = sum(tensor.elements for tensor in model.outside.values())
    linear = max(rows * columns for kind in model.kinds for rows, columns in kind.linear_shapes.values())
    tensor = max([linear, *(found.elements for found in model.outside.values())])
    heldout = _heldout_seconds(model, calibration, chain_rates)
    found = {
        "pack": Need(BASE + 4 * outside + largest, 3 * released / FILE_RATE),
        "verify": Need(
            BASE + max(VERIFY_BYTES * linear, 8 * tensor), weights * VERIFY_SECONDS + (stored + released) / FILE_RATE
        ),
        "evaluate": Need(
            memory["evaluate"],
            3 * heldout + weights * ROUND_SECONDS + (stored + released + model.blocks * states) / FILE_RATE,
        ),
        "benchmark": Need(memory["benchmark"] + ASKING, BENCHMARK_SECONDS + released / FILE_RATE),
    }
    if scheme.quantizes:
        seconds = max(sum(modelled_seconds(model, kind, calibration, tuning, rates)) for kind in model.kinds)
        slower = 10 if tuning.engine == "auto_round" and tuning.iters else 1  # docs/performance.md
        found["quantize"] = Need(memory["quantize"], slower * seconds + (largest + 4 * states) / FILE_RATE)
    else:
        found["copy_block"] = Need(memory["copy_block"], 2 * largest / FILE_RATE)
    first = sum(2 * kind.elements for block in range(first_blocks) for kind in [model.kind_of(block)]) + 2 * outside
    whole = 2 * model.parameters
    checked = memory["evaluate"]  # what the engine says is held against passes of the release's own blocks
    found["load_test"] = Need(checked + _engine_bytes(first, target), _serving_seconds(first, target))
    found["deploy"] = Need(checked + _engine_bytes(whole, target), heldout + _serving_seconds(whole, target))
    found["measure_served"] = served_need(model, target)
    return found


def served_need(model: ModelShapes, target: Target) -> Need:
    """Of a benchmark of a model that `target` serves."""
    held = 2 * model.parameters
    return Need(BASE + _engine_bytes(held, target), BENCHMARK_SECONDS + _serving_seconds(held, target))


def _engine_bytes(held: int, target: Target) -> int:
    return ASKING + (BASE + held if target.device == "cpu" else ENGINE_BYTES)


def _serving_seconds(held: int, target: Target) -> float:
    return SERVING_SECONDS + 2 * target.startup_seconds + 3 * held / FILE_RATE


def _states(model: ModelShapes, calibration: Calibration) -> int:
    samples = calibration.nsamples + calibration.heldout.nsamples
    return 2 * samples * calibration.seqlen * model.config["hidden_size"]


def _heldout_seconds(model: ModelShapes, calibration: Calibration, rates: Rates) -> float:
    tokens = calibration.heldout.nsamples * calibration.seqlen
    head = 2 * tokens * model.config["hidden_size"] * model.config["vocab_size"]
    blocks = (len(kind.blocks) * pass_work(kind, model.config, tokens, calibration.seqlen) for kind in model.kinds)
    return (head + sum(blocks)) * rates.pass_operation


def _linear_elements(kind) -> int:
    return sum(rows * columns for rows, columns in kind.linear_shapes.values())

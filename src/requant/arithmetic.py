"""What an engine computes a release with: activations rounded as the format says, or in BF16 beside weights alone.

NVFP4 has 4-bit activations, and GPUs have products of such numbers from sm100 on. On older ones an engine refuses the
format, or decodes the weights as it goes and leaves activations as they are: another model than the one that was
evaluated, though a right one. What each does is a fact of engine, format and GPU, and is written down here with the
version and the run that it rests on. An engine that says in its log what it does is believed before that.
"""

import re
from dataclasses import dataclass
from typing import Literal

from requant.config import Target
from requant.records import Arithmetic
from requant.schemes import Scheme

# Which quantized Linears round their inputs: all, none, those of routed experts alone, all but those.
Rounds = Literal["all", "none", "experts", "others"]
REFUSED, ROUNDED, ALONE = "refused", "activations rounded", "weights alone"
NOT_RUN = "not run here"


@dataclass(frozen=True)
class Fact:
    """What `engine` of `version` does with releases of `scheme` on GPUs from sm`first` to sm`last` (None: and later).

    said: its own words, where it refuses; basis: what this rests on. experts: whether it is so of mixtures of experts
    alone, or of all other models alone; of both if None.
    """

    engine: str
    scheme: str
    first: int
    last: int | None
    does: str
    version: str
    basis: str
    said: str | None = None
    experts: bool | None = None


ON_H200 = "run on an H200, sm90"
FACTS = (
    Fact("vllm", "NVFP4", 0, 74, REFUSED, "0.26.0", f"its code: Marlin from sm75 on; {NOT_RUN}"),
    Fact("vllm", "NVFP4", 75, 89, ALONE, "0.26.0", f"its code: Marlin from sm75 on; {NOT_RUN}"),
    Fact("vllm", "NVFP4", 90, 99, ALONE, "0.26.0", f"{ON_H200}: Marlin in Linears and experts"),
    Fact("vllm", "NVFP4", 100, None, ROUNDED, "0.26.0", f"its documentation; {NOT_RUN}"),
    Fact(
        *("sglang", "NVFP4", 0, 99, REFUSED, "0.5.16", ON_H200),
        said="Current platform does not support w4a4 nvfp4 quantization",
    ),
    Fact("sglang", "NVFP4", 100, None, ROUNDED, "0.5.16", f"its documentation; {NOT_RUN}"),
    Fact(
        *("vllm", "W3A16", 0, None, REFUSED, "0.26.0", ON_H200),
        said="CompressedTensorsWNA16MarlinMoEMethod only supports int4 and int8 now",
        experts=True,
    ),
    Fact("vllm", "W3A16", 0, 74, REFUSED, "0.26.0", f"its code: Humming from sm75 on; {NOT_RUN}", experts=False),
    Fact("vllm", "W3A16", 75, None, ALONE, "0.26.0", f"its code; {ON_H200}: Humming", experts=False),
    Fact(
        *("sglang", "W3A16", 0, None, REFUSED, "0.5.16", ON_H200),
        said="Other method (CompressedTensorsW4A16Sparse24) is not supported now",
    ),
    Fact("vllm", "W4A16", 0, None, ALONE, "0.26.0", f"{ON_H200}: Machete or Marlin in Linears, Marlin in experts"),
    Fact("sglang", "W4A16", 0, None, ALONE, "0.5.16", f"{ON_H200}: Marlin in experts"),
    Fact("vllm", "W8A16", 0, None, ALONE, "0.26.0", f"{ON_H200}: Machete or Marlin in Linears, Marlin in experts"),
    Fact("sglang", "W8A16", 0, None, ALONE, "0.5.16", f"its documentation; {NOT_RUN}"),
)

# What an engine's log says of NVFP4: by engine, for which Linears, and the name of the kernel in it.
KERNELS = {
    "vllm": {
        "others": re.compile(r"Using (?:NvFp4LinearBackend\.)?(\w+?)(?:NvFp4LinearKernel)? for NVFP4 GEMM"),
        "experts": re.compile(r"Using '?(\w+?)'? NvFp4 MoE backend"),
    },
}
# Kernels that decode weights and leave activations in BF16. All others round them, emulation too.
WEIGHTS_ALONE = re.compile(r"marlin", re.IGNORECASE)
# Where no kernel is named. vLLM says it too on GPUs that have FP4 products, of a part that falls back.
FALLBACK = re.compile(r"Weight-only FP4 compression will be used")


def fact(engine: str, scheme: Scheme, gpu: str, experts: bool = True) -> Fact | None:
    """What is known of `engine` with `scheme` on `gpu` (sm90); None where nothing is, as of BF16.

    experts: whether the release is a mixture of experts.
    """
    architecture = int(gpu.removeprefix("sm"))
    for found in FACTS:
        there = found.first <= architecture and (found.last is None or architecture <= found.last)
        there = there and found.experts in (None, experts)
        if there and (found.engine, found.scheme) == (engine, scheme.name):
            return found
    return None


def planned(scheme: Scheme, target: Target, decoded: bool) -> Arithmetic:
    """What the engine of `target` will compute a release of `scheme` with, as far as is known before it runs.

    decoded: whether it is given BF16 weights.
    """
    if not scheme.quantizes_activations:
        return Arithmetic(rounds="none", known_from=f"{scheme.name}: activations stay in BF16")
    if decoded or target.engine == "transformers" or target.gpu is None:
        return _arithmetic(scheme, "none", "the weights are decoded to BF16")
    found = fact(target.engine, scheme, target.gpu)
    if found is None or found.does == REFUSED:
        return _arithmetic(scheme, "all", f"the format; nothing is known of {target.engine} on {target.gpu}")
    rounds: Rounds = "all" if found.does == ROUNDED else "none"
    return _arithmetic(scheme, rounds, f"{found.engine} {found.version} on {target.gpu}, {found.basis}")


def observed(scheme: Scheme, target: Target, decoded: bool, log: str) -> Arithmetic:
    """The same of an engine that has run: by its log, where that says it."""
    expected = planned(scheme, target, decoded)
    if decoded or not scheme.quantizes_activations or target.engine not in KERNELS:
        return expected
    kernels = {kind: pattern.findall(log) for kind, pattern in KERNELS[target.engine].items()}
    named = {kind: names[-1] for kind, names in kernels.items() if names}
    if not named:
        return _arithmetic(scheme, "none", "the engine's log: weight-only FP4") if FALLBACK.search(log) else expected
    rounding = {kind for kind, name in named.items() if not WEIGHTS_ALONE.search(name)}
    words = " and ".join(f"{name} in {_WHERE[kind]}" for kind, name in sorted(named.items(), reverse=True))
    rounds: Rounds = "none" if not rounding else "all" if rounding == set(named) else rounding.pop()
    return _arithmetic(scheme, rounds, f"the engine's log: {words}")


_WHERE = {"others": "Linears", "experts": "experts"}


def _arithmetic(scheme: Scheme, rounds: Rounds, known_from: str) -> Arithmetic:
    left = {"none": "", "experts": " outside of experts", "others": " of experts"}
    unlike = None
    if rounds != "all":
        unlike = (
            f"the engine leaves activations{left[rounds]} in BF16, the evaluation rounds them all to {scheme.name}: "
            "what is served is another model than the one that was evaluated"
        )
    return Arithmetic(rounds=rounds, known_from=known_from, unlike_evaluated=unlike)


def in_words(found: Arithmetic) -> str:
    """What is rounded, for people."""
    return {
        "all": "activations rounded as the format says",
        "none": "weights alone, activations in BF16",
        "experts": "activations rounded in experts alone",
        "others": "activations rounded in all Linears but experts",
    }[found.rounds]

"""What an engine computes with: known by engine, format and GPU before it runs, and by its log once it has."""

import pytest

from requant.arithmetic import ALONE, FACTS, NOT_RUN, REFUSED, ROUNDED, fact, in_words, observed, planned
from requant.config import Target
from requant.records import Arithmetic
from requant.schemes import SCHEMES

NVFP4 = SCHEMES["NVFP4"]
STAMP = "(EngineCore pid=125) INFO 11-30 12:00:17 "
LINEAR = STAMP + "[__init__.py:683] Using {}NvFp4LinearKernel for NVFP4 GEMM\n"
OLD_LINEAR = STAMP + "[nvfp4_utils.py:85] Using NvFp4LinearBackend.{} for NVFP4 GEMM\n"
EXPERTS = (
    STAMP + "[nvfp4.py:209] Using '{}' NvFp4 MoE backend out of potential backends: ['FLASHINFER_TRTLLM', "
    "'FLASHINFER_CUTLASS', 'VLLM_CUTLASS', 'MARLIN', 'EMULATION'].\n"
)
FALLBACK = (
    "(Worker_TP0 pid=201) WARNING 11-30 12:00:18 [marlin_utils_fp4.py:137] Your GPU does not have native support for "
    "FP4 computation but FP4 quantization is being used. Weight-only FP4 compression will be used leveraging the "
    "Marlin kernel. This may degrade performance for compute-heavy workloads.\n"
)


def gpu(engine: str, architecture: str, **keys) -> Target:
    return Target(engine=engine, device="cuda", gpu=architecture, **keys)


@pytest.mark.parametrize(
    ("engine", "architecture", "does"),
    [
        *[("vllm", "sm70", REFUSED), ("vllm", "sm80", ALONE), ("vllm", "sm90", ALONE)],
        *[("vllm", "sm100", ROUNDED), ("vllm", "sm120", ROUNDED)],
        *[("sglang", "sm80", REFUSED), ("sglang", "sm90", REFUSED)],
        *[("sglang", "sm100", ROUNDED), ("sglang", "sm120", ROUNDED)],
    ],
)
def test_what_each_engine_does_with_nvfp4_is_written_down(engine, architecture, does):
    found = fact(engine, NVFP4, architecture)
    assert found.does == does and found.version and found.basis
    if architecture == "sm90":
        assert "H200" in found.basis, "what was run"
    else:
        assert NOT_RUN in found.basis or does == REFUSED


def test_every_scheme_that_quantizes_has_a_fact_on_each_gpu():
    """A combination that nothing is written of is refused; those that there are targets for must not be."""
    for engine in ("vllm", "sglang"):
        for architecture in ("sm75", "sm80", "sm89", "sm90", "sm100", "sm103", "sm120"):
            for scheme in SCHEMES.values():
                for experts in (True, False):
                    assert (fact(engine, scheme, architecture, experts) is None) == (not scheme.quantizes)
    assert all((it.said is not None) <= (it.does == REFUSED) for it in FACTS)


def test_before_an_engine_runs_the_table_says_what_it_computes_with():
    alone = planned(NVFP4, gpu("vllm", "sm90"), decoded=False)
    assert alone.rounds == "none" and alone.known_from.startswith("vllm 0.26.0 on sm90, run on an H200")
    assert "another model than the one that was evaluated" in alone.unlike_evaluated
    rounded = planned(NVFP4, gpu("sglang", "sm120"), decoded=False)
    assert rounded.rounds == "all" and rounded.unlike_evaluated is None
    for target in (Target(), gpu("vllm", "sm120", weights="decoded")):
        decoded = planned(NVFP4, target, decoded=True)
        assert decoded.rounds == "none" and "decoded" in decoded.known_from and decoded.unlike_evaluated
    integers = planned(SCHEMES["W4A16"], gpu("vllm", "sm90"), decoded=False)
    assert integers.rounds == "none" and integers.unlike_evaluated is None, "as it was evaluated"


@pytest.mark.parametrize(
    ("log", "rounds"),
    [
        ("", "all"),
        (LINEAR.format("FlashInferCutlass") + EXPERTS.format("FLASHINFER_CUTLASS"), "all"),
        (LINEAR.format("Emulation") + EXPERTS.format("EMULATION"), "all"),
        (LINEAR.format("Marlin") + EXPERTS.format("MARLIN") + FALLBACK, "none"),
        (OLD_LINEAR.format("MARLIN") + EXPERTS.format("MARLIN"), "none"),
        (OLD_LINEAR.format("FLASHINFER_CUTLASS"), "all"),
        (LINEAR.format("Marlin"), "none"),
        (FALLBACK, "none"),
        (LINEAR.format("Marlin") + FALLBACK + EXPERTS.format("VLLM_CUTLASS"), "experts"),
        (LINEAR.format("Cutlass") + EXPERTS.format("MARLIN") + FALLBACK, "others"),
        (LINEAR.format("Cutlass") + EXPERTS.format("VLLM_CUTLASS") + FALLBACK, "all"),
    ],
)
def test_an_engines_log_is_believed_before_the_table(log, rounds):
    """On sm120, where the table says that activations are rounded: vLLM chooses kernels by part."""
    found = observed(NVFP4, gpu("vllm", "sm120"), decoded=False, log=STAMP + "[x.py:1] loading\n" + log)
    assert found.rounds == rounds
    assert found.known_from.startswith("the engine's log: " if log else "vllm 0.26.0 on sm120")
    assert (found.unlike_evaluated is None) == (rounds == "all")


def test_a_log_says_nothing_of_weights_that_were_decoded():
    log = LINEAR.format("FlashInferCutlass")
    assert observed(NVFP4, gpu("vllm", "sm120", weights="decoded"), True, log).rounds == "none"
    assert observed(SCHEMES["W4A16"], gpu("vllm", "sm120"), False, log).rounds == "none"


def test_each_arithmetic_has_words_of_its_own():
    ways = ("all", "none", "experts", "others")
    assert len({in_words(Arithmetic(rounds=rounds, known_from="x")) for rounds in ways}) == len(ways)

"""What jobs ask of a cluster: the plan's figures from shapes alone, and more of them with each attempt."""

import subprocess
import sys

import pytest
import tiny

from requant import attention, fused, memory, routed, stacks, structure
from requant.config import Calibration, Release, Target, Tuning
from requant.duration import Rates
from requant.fp8 import without_scales
from requant.locks import tensors_of
from requant.memory import cpu_bytes, gpu_bytes
from requant.naming import entries
from requant.needs import MARGIN, Need, memory_mb, model_needs, release_needs, run_minutes
from requant.schemes import SCHEMES
from requant.shapes import ModelShapes, shapes_of
from requant.sizes import Shaped
from requant.view import pruned_config

CALIBRATION = Calibration(nsamples=8, seqlen=64)
RATES = Rates("a machine", "measured", 0.01, 1e-12, 1e-9, 1e-12, "the same", 1.0, coordination=0.1, job_start=2.0)


@pytest.fixture(scope="module", params=["deepseek_v3", "deepseek_v32", "mixtral", "qwen3_moe", "llama"])
def models(request, tmp_path_factory) -> tuple[structure.Structure, ModelShapes]:
    """A tiny model as the plan knows it and by its shapes."""
    directory = tiny.write_checkpoint(tmp_path_factory.mktemp(request.param), request.param)
    return both(directory)


def both(directory, experts: int | None = None) -> tuple[structure.Structure, ModelShapes]:
    from requant.checkpoint import Checkpoint

    config, tensors = Checkpoint(directory).config, tensors_of(str(directory))
    planned = structure.from_tensors(config, tensors, 0, "headers")
    held = entries(without_scales(tensors), config)
    shaped = {name: Shaped(entry.dtype, tuple(entry.shape)) for name, entry in held.items()}
    if experts is None:
        return planned, shapes_of(config, shaped)
    return planned.pruned(experts), shapes_of(pruned_config(config, experts), shaped, pruned=True)


@pytest.mark.parametrize("scheme", ["NVFP4", "W3A16", "BF16"])
def test_memory_by_shapes_is_the_plans(models, scheme):
    planned, shaped = models
    assert [kind.blocks for kind in shaped.kinds] == [kind.blocks for kind in planned.kinds]
    assert [kind.linear_shapes for kind in shaped.kinds] == [kind.linear_shapes for kind in planned.kinds]
    for tuning in (Tuning(), Tuning(iters=0), Tuning(device="cuda")):
        wanted = cpu_bytes(planned, CALIBRATION, SCHEMES[scheme], tuning)
        assert cpu_bytes(shaped, CALIBRATION, SCHEMES[scheme], tuning) == wanted


def test_a_pruned_model_is_its_sources_shapes_with_fewer_experts(tmp_path):
    directory = tiny.write_checkpoint(tmp_path, "deepseek_v3", mtp=True)
    planned, shaped = both(directory, experts=4)
    assert (shaped.parameters, shaped.drafting) == (planned.parameters, 0)
    assert {kind.experts for kind in shaped.kinds} == {0, 4}
    planned, shaped = both(directory)
    assert (shaped.parameters, shaped.drafting) == (planned.parameters, planned.drafting) and shaped.drafting


def test_constants_are_those_of_the_code_that_tunes():
    assert memory.DENSE_ACTIVATIONS == fused.DENSE_ACTIVATIONS
    assert memory.ROW_MULTIPLE == routed.ROW_MULTIPLE
    assert memory.LONGEST_SHORT == attention.LONGEST_SHORT
    assert memory.LARGEST_PART == stacks.LARGEST_PART
    for iters in (1, 200, 254, 255, 256, 1000):
        assert memory.counter_bytes(iters) == stacks.Schedule(iters, 1.0, 1.0, True).dtype.itemsize


def test_gpu_memory_is_still_the_tuners(models):
    planned, _ = models
    tokens = min(Tuning().batch_size, CALIBRATION.nsamples) * CALIBRATION.seqlen
    peaks = [
        fused.peak_bytes(kind.module, tokens, planned.experts_per_token, SCHEMES["NVFP4"], 200)
        for kind in planned.kinds
    ]
    assert gpu_bytes(planned, CALIBRATION, SCHEMES["NVFP4"], Tuning()) == max(peaks)


def test_jobs_ask_for_the_plans_memory(models):
    planned, shaped = models
    release = Release(model="m", scheme="NVFP4")
    wanted = cpu_bytes(planned, CALIBRATION, SCHEMES["NVFP4"], release.tuning)
    found = release_needs(shaped, 10**9, release, CALIBRATION, Target(), 1, RATES, RATES)
    assert found["quantize"].bytes == wanted["quantize"] and found["evaluate"].bytes == wanted["evaluate"]
    assert model_needs(shaped, 10**9, CALIBRATION, RATES)["reference"].bytes == wanted["reference"]
    copied = Release(model="m", scheme="BF16")
    assert "copy_block" in release_needs(shaped, 10**9, copied, CALIBRATION, Target(), 1, RATES, RATES)


def test_a_second_attempt_gets_more():
    need = Need(1_000_000_000, 600.0)
    assert memory_mb(need, 0, 1) == MARGIN * 1000
    assert [memory_mb(need, 0, attempt) for attempt in (2, 3)] == [1800, 2700]
    assert memory_mb(need, 1000, 1) > memory_mb(need, 0, 1), "Snakemake runs inside of a submitted job"
    assert [run_minutes(need, attempt) for attempt in (1, 2, 3)] == [30, 60, 120]
    assert run_minutes(Need(1), 1) == 10


def test_a_job_of_a_slower_engine_may_take_longer(models):
    _, shaped = models
    times = [
        release_needs(
            shaped,
            10**9,
            Release(model="m", scheme="NVFP4", tuning={"engine": engine}),
            CALIBRATION,
            Target(),
            1,
            RATES,
            RATES,
        )["quantize"].seconds
        for engine in ("fused", "auto_round")
    ]
    assert times[1] > 5 * times[0]


def test_planning_what_jobs_need_imports_no_torch():
    code = "import sys, requant.needs, requant.shapes; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0

"""What a target can serve, told before anything is built: each refusal is one line with what was found and expected."""

import re
from dataclasses import replace
from itertools import product

import pytest
import tiny

from requant import engine_runs, targets
from requant.checkpoint import Checkpoint
from requant.config import Target, parse
from requant.engine_runs import Run
from requant.errors import RequantError
from requant.fp8 import without_scales
from requant.locks import tensors_of
from requant.naming import entries
from requant.schemes import SCHEMES
from requant.sizes import Shaped
from requant.structure import from_tensors
from requant.targets import (
    cache_bytes_per_token,
    cached_tokens,
    check_family,
    check_here,
    check_memory,
    check_scheme,
    holds_packed,
    shortage,
    unsupported,
    wanted_context,
    weight_bytes,
)

DENSE = {"hidden_size": 1024, "num_attention_heads": 8, "head_dim": 128, "num_key_value_heads": 2}
DENSE |= {"intermediate_size": 3072, "num_hidden_layers": 10, "max_position_embeddings": 4096}
MLA = {"hidden_size": 7168, "num_attention_heads": 128, "q_lora_rank": 1536, "kv_lora_rank": 512, "v_head_dim": 128}
MLA |= {"qk_rope_head_dim": 64, "num_hidden_layers": 61, "num_key_value_heads": 128, "moe_intermediate_size": 2048}
V32 = MLA | {"index_head_dim": 128, "max_position_embeddings": 163840, "model_type": "deepseek_v32"}


OTHER, OTHER_MOE = {"model_type": "gemma3"}, {"model_type": "gpt_oss", "num_local_experts": 32}  # that were not run


def gpu(engine: str, architecture: str, **keys) -> Target:
    return Target(engine=engine, device="cuda", gpu=architecture, **keys)


# Scheme and family


def test_nvfp4_is_refused_where_its_engine_refuses_it():
    for architecture in ("sm80", "sm89", "sm90"):
        with pytest.raises(RequantError) as raised:
            check_scheme("r", SCHEMES["NVFP4"], "here", gpu("sglang", architecture), OTHER_MOE)
        assert str(raised.value) == (
            f"releases.r: scheme NVFP4 can't be served at target 'here': sglang 0.5.16 refuses NVFP4 on {architecture} "
            "(run on an H200, sm90: Current platform does not support w4a4 nvfp4 quantization); expected another "
            "scheme, or another deploy.target"
        )
        check_scheme("r", SCHEMES["NVFP4"], "here", gpu("vllm", architecture), OTHER_MOE)
    with pytest.raises(RequantError, match=r"vllm 0\.26\.0 refuses NVFP4 on sm70 \(its code: Marlin from sm75 on"):
        check_scheme("r", SCHEMES["NVFP4"], "here", gpu("vllm", "sm70"), OTHER_MOE)
    for engine, architecture in product(("vllm", "sglang"), ("sm100", "sm103", "sm120")):
        check_scheme("r", SCHEMES["NVFP4"], "here", gpu(engine, architecture), OTHER_MOE)


@pytest.mark.parametrize("engine", ["vllm", "sglang"])
def test_integers_of_three_bits_have_no_kernels_there(engine):
    with pytest.raises(RequantError, match=rf"{engine} [\d.]+ refuses W3A16 on sm90 \(run on an H200, sm90: "):
        check_scheme("r", SCHEMES["W3A16"], "here", gpu(engine, "sm90"), OTHER_MOE)
    for name in ("W4A16", "W8A16"):
        check_scheme("r", SCHEMES[name], "here", gpu(engine, "sm90"), OTHER_MOE)


def test_a_family_that_was_run_is_refused_as_the_engine_did():
    target = gpu("vllm", "sm90")
    with pytest.raises(RequantError) as raised:
        check_scheme("r", SCHEMES["W3A16"], "here", target, {"model_type": "mixtral", "num_local_experts": 8})
    assert str(raised.value) == (
        "releases.r: scheme W3A16 can't be served at target 'here': vllm 0.26.0 refuses W3A16 of mixtral on sm90 (run "
        "there: ValueError: CompressedTensorsWNA16MarlinMoEMethod only supports int4 and int8 now.); expected another "
        "scheme, or another deploy.target"
    )
    check_scheme("r", SCHEMES["W3A16"], "here", target, {"model_type": "llama"})
    check_scheme("r", SCHEMES["W3A16"], "here", target, OTHER)


@pytest.mark.parametrize("scheme", ["W4A16", "BF16"])
def test_a_family_that_was_answered_wrongly_is_refused_whatever_is_known_in_general(monkeypatch, scheme):
    found = Run("vllm", "0.26.0", "sm90", "llama", scheme, "as planned", "wrong", "3.1", "", "greedy, garble")
    served = replace(found, version="0.9.9", outcome="served", told="")
    monkeypatch.setattr(engine_runs, "runs", lambda: (found, served))
    told = f"vllm 0.26.0 answers {scheme} wrongly of llama on sm90 (run there: greedy, garble)"
    assert unsupported(SCHEMES[scheme], gpu("vllm", "sm90"), "llama", False) == told
    monkeypatch.setattr(engine_runs, "runs", lambda: (replace(served, version="0.30.0"), found))
    assert unsupported(SCHEMES[scheme], gpu("vllm", "sm90"), "llama", False) is None, "a newer engine mends it"
    monkeypatch.setattr(engine_runs, "runs", lambda: (replace(found, packed="all"),))
    assert unsupported(SCHEMES[scheme], gpu("vllm", "sm90"), "llama", False) is None, "no release is packed so"


@pytest.mark.parametrize("engine", ["vllm", "sglang"])
def test_a_target_for_checkpoints_of_modelopt_takes_no_release(engine):
    """The public card says `--quantization modelopt_fp4` of a checkpoint with compressed-tensors names."""
    target = gpu(engine, "sm120", quantization="modelopt_fp4")
    with pytest.raises(RequantError, match="reads checkpoints of that format, a release is compressed-tensors"):
        check_scheme("r", SCHEMES["NVFP4"], "here", target, OTHER_MOE)
    assert unsupported(SCHEMES["BF16"], target, "llama", False).endswith("a release is not quantized")
    check_scheme("r", SCHEMES["NVFP4"], "here", gpu(engine, "sm120", quantization="compressed-tensors"), OTHER)


@pytest.mark.parametrize("engine", ["vllm", "sglang"])
def test_decoded_weights_are_served_wherever_bf16_is(engine):
    decoded = gpu(engine, "sm90", weights="decoded")
    assert [unsupported(scheme, decoded, "mixtral", True) for scheme in SCHEMES.values()] == [None] * 5
    assert not holds_packed(gpu(engine, "sm120", weights="decoded")) and holds_packed(gpu(engine, "sm120"))


@pytest.mark.parametrize(
    ("image", "family", "first"),
    [
        ("vllm/vllm-openai:v0.10.2", "deepseek_v32", "0.11.0"),
        ("vllm/vllm-openai:v0.11.0", "deepseek_v32", None),
        ("vllm/vllm-openai:v0.31.0", "deepseek_v32", None),
        ("vllm/vllm-openai:v0.10.2", "deepseek_v3", None),
        ("vllm/vllm-openai:v0.6.5-cu121", "deepseek_v3", "0.6.6"),
        ("vllm/vllm-openai:v0.6.5", "llama", None),
        ("vllm/vllm-openai:nightly", "deepseek_v32", None),
        (f"vllm/vllm-openai@sha256:{'0' * 64}", "deepseek_v32", None),
        (None, "deepseek_v32", None),
    ],
)
def test_an_engine_too_old_for_the_family_is_told_by_the_tag(image, family, first):
    target = gpu("vllm", "sm100", image=image)
    if first is None:
        return check_family("r", family, "here", target)
    with pytest.raises(RequantError) as raised:
        check_family("r", family, "here", target)
    assert str(raised.value) == (
        f"releases.r: its model can't be served at target 'here': vllm knows {family} from {first} on, found image "
        f"{image}; expected another deploy.target"
    )


def test_a_cache_that_garbles_the_model_is_refused():
    target = gpu("sglang", "sm120", kv_cache="fp8_e4m3")
    with pytest.raises(RequantError, match="with `kv_cache: fp8_e4m3` deepseek_v32 answers with garbled text there"):
        check_family("r", "deepseek_v32", "here", target)
    check_family("r", "glm4_moe", "here", target)
    check_family("r", "deepseek_v32", "here", gpu("sglang", "sm120", kv_cache="bf16"))
    check_family("r", "deepseek_v32", "here", gpu("vllm", "sm120", kv_cache="fp8_e4m3"))


def test_transformers_serves_every_scheme():
    assert [unsupported(scheme, Target(), "mixtral", True) for scheme in SCHEMES.values()] == [None] * len(SCHEMES)


@pytest.mark.parametrize("engine", ["vllm", "sglang"])
def test_every_engine_serves_bf16(engine):
    assert unsupported(SCHEMES["BF16"], gpu(engine, "sm80"), "llama", False) is None


@pytest.mark.parametrize(
    "keys,line",
    [
        ({"engine": "sglang"}, "targets.x.device: 'cpu': engine sglang is planned for on GPUs only; expected cuda"),
        (
            {"engine": "vllm", "device": "cuda"},
            "targets.x.gpu: missing: which formats vllm serves depends on it; expected sm90, sm120, ...",
        ),
        ({"devices": 2}, "targets.x.device: 'cpu': `gpu` and `devices` describe GPUs; expected cuda"),
        ({"gpu": "H100"}, "targets.x.gpu: 'H100'; expected: String should match pattern '^sm\\d{2,3}$'"),
    ],
)
def test_a_target_that_makes_no_sense_is_one_line(keys, line):
    data = {"models": {"m": {"path": "m"}}, "releases": {"r": {"model": "m", "scheme": "NVFP4"}}, "build": ["r"]}
    with pytest.raises(RequantError) as raised:
        parse(data | {"targets": {"x": keys}})
    assert str(raised.value) == f"config: {line}"


def test_an_engine_on_a_gpu_has_an_hour_to_start():
    assert Target().startup_seconds == 180 and gpu("sglang", "sm90").startup_seconds == 3600
    assert Target(device="cuda").startup_seconds == 3600
    assert gpu("vllm", "sm90", startup_seconds=60).startup_seconds == 60


# Memory


def test_kv_cache_of_a_token():
    """GQA: a key and a value a head, heads shared out, one at least a device. MLA: latents, whole on each device."""
    assert cache_bytes_per_token(DENSE, 1) == 10 * 2 * 2 * 128 * 2
    assert cache_bytes_per_token(DENSE, 2) == cache_bytes_per_token(DENSE, 8) == 10 * 2 * 128 * 2
    assert cache_bytes_per_token(MLA, 1) == cache_bytes_per_token(MLA, 8) == 61 * (512 + 64) * 2
    assert cache_bytes_per_token(MLA | {"index_head_dim": 128}, 8) == 61 * (512 + 64 + 128) * 2
    without_head_dim = {key: value for key, value in DENSE.items() if key != "head_dim"}
    assert cache_bytes_per_token(without_head_dim, 1) == cache_bytes_per_token(DENSE, 1)


def test_cached_tokens_are_what_is_left_beside_the_weights():
    target = gpu("sglang", "sm120", devices=8, memory_gb=96, memory_fraction=0.5)
    assert cached_tokens(target, 40_000_000_000, 1_000_000) == 8_000
    assert cached_tokens(target, 50_000_000_000, 1_000_000) < 0
    assert cached_tokens(Target(), 1, 1) is None


def test_a_cache_of_one_byte_a_value_takes_half():
    assert cache_bytes_per_token(MLA, 8, "fp8_e4m3") * 2 == cache_bytes_per_token(MLA, 8, "bf16")


def test_the_public_release_fits_its_eight_gpus_at_half_a_million_tokens():
    """288.9 GB of NVFP4 on 8 x 96 GB: 36.1 GB of each, and 704 values of 2 bytes a token in each of 61 blocks."""
    target = gpu("sglang", "sm120", devices=8, memory_gb=96, concurrency=4, context=131072, kv_cache="bf16")
    check_memory("r", "here", target, 288_880_922_568, V32, wanted_context(target, V32, 2048))
    whole = target.model_copy(update={"context": None})
    assert wanted_context(whole, V32, 2048) == 163840 and wanted_context(whole, {}, 2048) == 2048
    with pytest.raises(RequantError) as raised:
        check_memory("r", "here", whole, 288_880_922_568, V32, 163840)
    assert str(raised.value) == (
        "releases.r: does not fit target 'here': weights take 36.1 GB of each device, 4 x 163,840 tokens of KV cache "
        "56.3 GB; 81.6 GB are there (96 GB x 0.85); would fit: context 132,410, or concurrency 3, or 16 devices"
    )


@pytest.mark.parametrize(
    ("keys", "fitting"),
    [
        ({"devices": 8, "concurrency": 1, "memory_gb": 48, "context": 131072}, "context 54,604, or 16 devices"),
        ({"devices": 2, "concurrency": 1, "memory_gb": 96, "context": 1024}, "4 devices"),
        ({"devices": 64, "concurrency": 1, "memory_gb": 5, "context": 1024}, "a smaller scheme or model"),
    ],
)
def test_a_shortage_says_what_would_fit_and_it_does(keys, fitting):
    target = gpu("sglang", "sm120", **keys)
    said = shortage(target, 288_880_922_568, V32, target.context)
    assert said.endswith(f"would fit: {fitting}")
    for key, number in re.findall(r"(context) ([\d,]+)", said):
        number = int(number.replace(",", ""))
        assert shortage(target.model_copy(update={key: number}), 288_880_922_568, V32, number) is None
        assert shortage(target.model_copy(update={key: number + 1}), 288_880_922_568, V32, number + 1) is not None
    if enough := re.search(r"(\d+) devices", said):
        more = target.model_copy(update={"devices": int(enough[1])})
        assert shortage(more, 288_880_922_568, V32, target.context) is None


def test_without_the_memory_of_a_device_nothing_is_said_of_fit():
    assert shortage(gpu("vllm", "sm100"), 10**15, V32, 163840) is None


@pytest.mark.parametrize("family", list(tiny.FAMILIES))
def test_weights_from_shapes_alone_are_those_of_the_release(family, tmp_path):
    """Planning has no torch: the same bytes as the plan's, which builds the model's blocks."""
    config = Checkpoint(tiny.write_checkpoint(tmp_path, family)).config
    stored = tensors_of(tmp_path)
    known = from_tensors(config, stored, 0, "headers")
    held = entries(without_scales(stored), config)
    tensors = {name: Shaped(entry.dtype, tuple(entry.shape)) for name, entry in held.items()}
    keep = [r"\.1\..*down_proj"]
    for scheme, drop in product(SCHEMES.values(), (False, True)):
        packed = weight_bytes(config, tensors, scheme, keep, drop, gpu("vllm", "sm120"))
        assert packed == known.release_size(scheme, keep, drop).tensors
        unpacked = weight_bytes(config, tensors, scheme, keep, drop, Target())
        assert unpacked == known.release_size(SCHEMES["BF16"], [], drop).tensors


def test_weights_of_a_pruned_model_are_those_that_are_kept(tmp_path):
    config = Checkpoint(tiny.write_checkpoint(tmp_path, "deepseek_v3")).config
    stored = tensors_of(tmp_path)
    known = from_tensors(config, stored, 0, "headers").pruned(4)
    held = entries(without_scales(stored), config)
    tensors = {name: Shaped(entry.dtype, tuple(entry.shape)) for name, entry in held.items()}
    found = weight_bytes(known.config, tensors, SCHEMES["W4A16"], [], True, gpu("vllm", "sm90"))
    assert found == known.release_size(SCHEMES["W4A16"], [], True).tensors


# This machine


def test_a_container_needs_an_engine_that_runs_it(monkeypatch, tmp_path):
    monkeypatch.delenv("DOCKER_HOST", raising=False)
    monkeypatch.setattr(targets, "DOCKER_SOCKET", str(tmp_path / "docker.sock"))
    check_here("r", "cpu-transformers", Target())
    target = Target(image="some/image:1")
    with pytest.raises(RequantError) as raised:
        check_here("r", "mine", target)
    assert str(raised.value) == (
        f"releases.r.deploy.target: 'mine' needs a Docker engine ({tmp_path}/docker.sock, or DOCKER_HOST): not on this "
        "machine. Up to results/r/verify.json, evaluate.json and benchmark.json it can be built: ask for these, or "
        "choose another deploy.target"
    )
    (tmp_path / "docker.sock").touch()
    check_here("r", "mine", target)
    (tmp_path / "docker.sock").unlink()
    monkeypatch.setenv("DOCKER_HOST", "unix:///elsewhere")
    check_here("r", "mine", target)


def test_a_gpu_has_to_be_here(monkeypatch, tmp_path):
    monkeypatch.setattr(targets, "GPU_DEVICES", (str(tmp_path / "nvidiactl"),))
    monkeypatch.setenv("DOCKER_HOST", "unix:///elsewhere")
    target = gpu("sglang", "sm120", devices=8, image="some/image:1")
    with pytest.raises(RequantError, match=r"'x' needs a GPU \(8 x sm120\): not on this machine\. Up to results/r/ver"):
        check_here("r", "x", target)
    (tmp_path / "nvidiactl").touch()
    check_here("r", "x", target)


def test_an_engine_without_an_image_has_to_be_installed(monkeypatch, tmp_path):
    monkeypatch.setattr(targets, "GPU_DEVICES", ("/dev/null",))
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(targets.sys, "executable", str(tmp_path / "none/python"))
    for engine in ("vllm", "sglang"):
        with pytest.raises(RequantError, match=f"'x' needs the program {engine}, or an `image` that has it: not on"):
            check_here("r", "x", gpu(engine, "sm120"))
    (tmp_path / "vllm").write_text("#!/bin/sh\n")
    (tmp_path / "vllm").chmod(0o755)
    check_here("r", "x", gpu("vllm", "sm120"))

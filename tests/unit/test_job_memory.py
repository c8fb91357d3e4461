"""Jobs on a block of large Linears stay within the memory that they ask for: the peak of each, in a process of its own.

What a cluster is asked for is `requant.needs`; BASE there is what a process holds before its job, and some constants.
"""

import gc
import json
import multiprocessing
import resource
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pytest
import torch

from requant.checkpoint import Checkpoint
from requant.config import Calibration, Release, Target, Tuning
from requant.duration import Rates
from requant.encoding import quantization_config
from requant.evaluate import rounded_block
from requant.memory import BASE, TUNER_BASE
from requant.needs import MARGIN, release_needs
from requant.packed import PackedCheckpoint, decoded_on
from requant.packing import pack
from requant.quantize import BlockJob, quantize_block
from requant.safetensors_io import save
from requant.schemes import SCHEMES, Scheme
from requant.shapes import shapes_of
from requant.sizes import Shaped
from requant.streamed import StreamedModel
from requant.verify import verify

CALIBRATION = Calibration(nsamples=8, seqlen=64, heldout={"nsamples": 2})
RATES = Rates("a machine", "measured", 0.01, 1e-12, 1e-9, 1e-12, "the same", 1.0, coordination=0.1, job_start=2.0)
# Rows that are worked on at a time, and what the allocator keeps: whatever the model.
CONSTANT = 100_000_000
QUANTIZING = [name for name, scheme in SCHEMES.items() if scheme.quantizes]


def linears(width: int) -> dict[str, tuple[int, int]]:
    """[out, in] of a Llama block with an MLP four times as wide."""
    found = {f"self_attn.{name}_proj": (128, width) for name in "qkv"} | {"self_attn.o_proj": (width, 128)}
    return (
        found
        | {f"mlp.{name}_proj": (4 * width, width) for name in ("gate", "up")}
        | {"mlp.down_proj": (width, 4 * width)}
    )


def config(width: int) -> dict:
    return {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": 4 * width,
        "hidden_size": width,
        "intermediate_size": 4 * width,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "head_dim": 64,
        "max_position_embeddings": 128,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": True,
    }


def parts_of(scheme: Scheme, out: int, width: int, draw: torch.Generator) -> dict[str, torch.Tensor]:
    """Random codes and scales, all of which an encoder can make."""
    words = torch.randint(-(2**31), 2**31, (out, width * scheme.weight_bits // 32), generator=draw).to(torch.int32)
    spread = 1 + torch.rand(out, width // scheme.group_size, generator=draw)
    if not scheme.is_nvfp4:
        shape = torch.tensor([out, width])
        return {"weight_packed": words, "weight_scale": (0.01 * spread).to(torch.bfloat16), "weight_shape": shape}
    return {
        "weight_packed": words.view(torch.uint8) & 0x77,  # no minus zeros
        "weight_scale": (100 * spread).to(torch.float8_e4m3fn),
        "weight_global_scale": torch.tensor([5000.0]),
        "input_global_scale": torch.tensor([100.0]),
    }


def write(folder: Path, scheme: Scheme, width: int) -> None:
    """In `model` a release, in `source` what it is exactly, of one block; and hidden states to quantize it on."""
    draw = torch.Generator().manual_seed(0)
    plain = {"model.embed_tokens.weight": torch.randn(4 * width, width, generator=draw).to(torch.bfloat16)}
    norms = ["norm", "layers.0.input_layernorm", "layers.0.post_attention_layernorm"]
    plain |= {f"model.{norm}.weight": torch.ones(width, dtype=torch.bfloat16) for norm in norms}
    source, packed = dict(plain), dict(plain)
    for linear, shape in linears(width).items():
        parts = parts_of(scheme, *shape, draw)
        source[f"model.layers.0.{linear}.weight"] = decoded_on("cpu", parts, scheme)
        packed |= {f"model.layers.0.{linear}.{part}": tensor for part, tensor in parts.items()}
    written = {"quantization_config": quantization_config(scheme, ["lm_head"])}
    for part, tensors, changes in (("source", source, {}), ("model", packed, written)):
        save(folder / part / "model.safetensors", tensors)
        (folder / part / "config.json").write_text(json.dumps(config(width) | changes))
    (folder / "source/tokenizer.json").write_text("{}")
    save(folder / "blocks/0.safetensors", {name: t for name, t in source.items() if ".layers.0." in name})
    shape = (CALIBRATION.nsamples, CALIBRATION.seqlen)
    ones = torch.ones(shape, dtype=torch.uint8)
    save(folder / "tokens.safetensors", {"calibration_mask": ones, "heldout_mask": ones.clone()})
    hidden = torch.randn(*shape, width, generator=draw).to(torch.bfloat16)
    save(folder / "hidden.safetensors", {"calibration": hidden})
    model = StreamedModel(Checkpoint(folder / "source"))
    save(folder / "targets.safetensors", {"calibration": model.run(model.block(0), hidden)})


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> dict[str, tuple[Path, Path]]:
    """By scheme a small release and a large one."""
    folders = {name: (tmp_path_factory.mktemp(name), tmp_path_factory.mktemp(name)) for name in QUANTIZING}
    for name, (small, large) in folders.items():
        write(small, SCHEMES[name], 128)
        write(large, SCHEMES[name], 1024)
    return folders


@pytest.fixture(scope="module")
def forked():
    """Makes processes that have imported what is imported here, so that each job's peak is its own."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    with ProcessPoolExecutor(1, mp_context=context, max_tasks_per_child=1) as pool:
        yield pool


def measured(job: Callable[..., object], small: Path, large: Path, *arguments) -> tuple[int, int]:
    """(bytes that this process holds before the large job, and at its peak on top of that). The small one imports and
    compiles whatever is not there yet."""
    torch.set_num_threads(1)
    job(small, *arguments)
    gc.collect()
    before = int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
    job(large, *arguments)
    return before, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before


def needs(scheme: str) -> dict[str, int]:
    """Bytes that the jobs of the large release ask for, by rule."""
    source = {f"model.layers.0.{name}.weight": Shaped("BF16", shape) for name, shape in linears(1024).items()}
    norms = ["norm", "layers.0.input_layernorm", "layers.0.post_attention_layernorm"]
    source |= {f"model.{name}.weight": Shaped("BF16", (1024,)) for name in norms}
    source["model.embed_tokens.weight"] = Shaped("BF16", (4096, 1024))
    release = Release(model="m", scheme=scheme, tuning=Tuning(iters=0))
    found = release_needs(shapes_of(config(1024), source), 10**8, release, CALIBRATION, Target(), 1, RATES, RATES)
    return {rule: need.bytes for rule, need in found.items()}


def within(found: tuple[int, int], asked: int, what: str, base: int = BASE) -> None:
    before, peak = found
    said = f"{what}: {peak / 1e6:.0f} MB beside {before / 1e6:.0f}; expected {(asked - base) / 1e6:.0f} beside "
    said += f"{base / 1e6:.0f}"
    print(said)
    assert before + peak <= MARGIN * asked and peak <= asked - base + CONSTANT, said


def verified(folder: Path) -> None:
    verify(folder / "source", folder / "model", "r", (0.99, 0.01), 2, folder / "verify.json")


def rounded(folder: Path) -> None:
    rounded_block(StreamedModel(Checkpoint(folder / "source")), PackedCheckpoint(folder / "model"), 0)


def decoded(folder: Path) -> None:
    StreamedModel(PackedCheckpoint(folder / "model")).block(0, quantize_activations=True)


def packed(folder: Path) -> None:
    """In BF16: every byte of the source goes through."""
    pack(folder / "source", "r", "m", "BF16", folder / "blocks", folder / "packed", folder / "pack.json")


def quantized(folder: Path, scheme: str) -> None:
    states = [folder / f"{name}.safetensors" for name in ("tokens", "hidden", "targets")]
    job = BlockJob(folder / "source", "r", "m", 0, scheme, Tuning(iters=0), [], *states)
    quantize_block(job, folder / "0.safetensors", folder / "0.json", folder / "next.safetensors")


@pytest.mark.parametrize("scheme", QUANTIZING)
def test_verify_holds_what_it_asks_for(made, forked, scheme):
    within(forked.submit(measured, verified, *made[scheme]).result(), needs(scheme)["verify"], scheme)


@pytest.mark.parametrize("scheme", ["NVFP4", "W3A16"])
@pytest.mark.parametrize("job", [rounded, decoded])
def test_evaluate_holds_what_it_asks_for_where_it_makes_a_block(made, forked, scheme, job):
    within(forked.submit(measured, job, *made[scheme]).result(), needs(scheme)["evaluate"], f"{job.__name__} {scheme}")


def test_pack_holds_what_it_asks_for(made, forked):
    within(forked.submit(measured, packed, *made["W8A16"]).result(), needs("BF16")["pack"], "BF16")


@pytest.mark.parametrize("scheme", ["NVFP4", "W8A16"])
def test_plain_rounding_holds_what_it_asks_for(made, forked, scheme):
    found = forked.submit(measured, quantized, *made[scheme], scheme).result()
    within(found, needs(scheme)["quantize"], scheme, TUNER_BASE)

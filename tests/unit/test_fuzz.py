"""Readers of what others made, fed with damaged and near-valid data: a value that keeps its promises, or one line.

Every run of `make test` has the same cases. REQUANT_FUZZ=100 makes a hundred times as many, other ones each time.
"""

import copy
import io
import json
import os
import struct
from collections import Counter
from pathlib import Path

import numpy as np
import safetensors
import safetensors.numpy
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from requant.architecture import FAMILIES, block_count, family
from requant.checkpoint import INDEX, Checkpoint
from requant.config import Calibration, Prune, Release, parse
from requant.disk import reference_files
from requant.errors import RequantError
from requant.layout import block_shapes
from requant.locks import index_agrees, load_lock
from requant.naming import entries
from requant.preflight import check_context, check_group, check_model
from requant.pruning import kept_experts
from requant.records import Lock, TensorEntry
from requant.safetensors_io import DTYPE_BYTES, header_of
from requant.targets import cache_bytes_per_token

TIMES = int(os.environ.get("REQUANT_FUZZ", "1"))
CASES = {"header": 4000, "lock": 2000, "config": 2000, "index": 1200, "config.json": 2000}
LONGEST = 700  # characters of a line, its path left out

# What stands in files that somebody wrote by hand, or on purpose.
SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 70),
    st.sampled_from([2**31, 2**53 + 1, 2**63, 2**64 - 1, -(2**63), 10**9, 10**40]),
    st.floats(width=16),
    st.sampled_from(["", ".", "..", "../x", "/etc/passwd", "a\nb", "\u202e", "\x00", "x" * 1000, "BF16", "1"]),
    st.text(max_size=8),
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


def places(tree, path=()):
    """The path of every key and item of a tree."""
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, value in items:
        yield (*path, key)
        yield from places(value, (*path, key))


@st.composite
def changed(draw, tree, values=VALUES):
    """`tree` with up to three of its places given another value, another key, or none; or another tree altogether."""
    if draw(st.integers(0, 60)) == 0:
        return draw(values)
    tree = copy.deepcopy(tree)
    for _ in range(draw(st.integers(0, 3))):
        if not (found := list(places(tree))):
            break
        *parents, last = draw(st.sampled_from(found))
        at = tree
        for key in parents:
            at = at[key]
        action = draw(st.sampled_from(["replace", "replace", "replace", "delete", "add", "rename", "copy"]))
        if action == "delete":
            del at[last]
        elif action == "replace" or isinstance(at, list):
            at[last] = draw(values)
        elif action == "copy":
            at[last] = copy.deepcopy(at[draw(st.sampled_from(sorted(at, key=str)))])
        else:
            at[draw(SCALARS.filter(lambda key: isinstance(key, str)))] = (
                at.pop(last) if action == "rename" else draw(values)
            )
    return tree


@st.composite
def damaged(draw, data):
    """`data` with up to four bits flipped, parts cut out, doubled or written over."""
    data = bytearray(data)
    for _ in range(draw(st.integers(0, 4))):
        at, length = draw(st.integers(0, len(data))), draw(st.integers(0, 40))
        action = draw(st.sampled_from(["flip", "cut", "end", "double", "write", "length"]))
        if action == "flip" and at < len(data):
            data[at] ^= 1 << draw(st.integers(0, 7))
        elif action == "cut":
            del data[at : at + length]
        elif action == "end":
            del data[at:]
        elif action == "double":
            data[at:at] = data[at : at + length]
        elif action == "write":
            data[at : at + length] = draw(st.binary(max_size=12) | st.sampled_from([b'"', b"{}", b"[" * 300, b"-1"]))
        elif len(data) >= 8:
            number = st.integers(0, 2 * len(data)) | st.sampled_from([10**8, 10**8 + 1, 2**63, 2**64 - 1])
            data[:8] = struct.pack("<Q", draw(number))
    return bytes(data)


def texts_of(tree):
    """JSON texts near that of `tree`: changed as a tree, or damaged as bytes."""
    return changed(tree).map(lambda found: json.dumps(found).encode()) | damaged(json.dumps(tree).encode())


def fuzz(what, strategy, read, named):
    """Runs `read` over the cases: what it gives keeps its own assertions, what it refuses is one line with `named`."""
    seen = Counter()

    @settings(
        max_examples=CASES[what] * TIMES,
        derandomize=TIMES == 1,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(strategy)
    def run(case):
        try:
            read(case)
        except RequantError as error:
            for line in str(error).split("\n") if what == "config" else [str(error)]:
                assert named in line and line.isprintable() and len(line.replace(named, "")) <= LONGEST
            seen["refused"] += 1
        else:
            seen["valid"] += 1

    run()
    assert seen.total() >= CASES[what] * TIMES
    assert min(seen["refused"], seen["valid"]) >= seen.total() // 50, f"one-sided cases: {seen}"


def test_there_are_ten_thousand_cases():
    assert sum(CASES.values()) >= 10_000


# safetensors headers

TENSORS = {
    "model.norm.weight": np.arange(4, dtype=np.float16),
    "a": np.ones((2, 3), np.float32),
    "b": np.zeros((0, 5), np.int8),
    "c": np.array(7, np.int64),
}
SAVED = safetensors.numpy.save(TENSORS, metadata={"format": "pt"})


def shards():
    """Shards whose bytes are damaged, or whose header is changed as a tree and written with its true length."""
    length = struct.unpack("<Q", SAVED[:8])[0]
    header, values = json.loads(SAVED[8 : 8 + length]), SAVED[8 + length :]

    def shard(tree):
        text = json.dumps(tree).encode()
        return struct.pack("<Q", len(text)) + text + values

    return damaged(SAVED) | changed(header).map(shard)


def test_headers(tmp_path):
    """What requant takes, safetensors takes too, and finds the same tensors at the same places."""

    def read(data):
        found = header_of(io.BytesIO(data), len(data), Path("x.safetensors"))
        theirs = {name: entry for name, entry in safetensors.deserialize(data)}
        assert found.keys() == theirs.keys()
        at = 8 + struct.unpack("<Q", data[:8])[0]
        for name, entry in found.items():
            assert (entry.dtype, entry.shape) == (theirs[name]["dtype"], theirs[name]["shape"])
            size = int(np.prod(entry.shape, dtype=object)) * DTYPE_BYTES[entry.dtype]
            assert entry.offset == at and data[at : at + size] == bytes(theirs[name]["data"])
            at += size
        assert at == len(data)

    fuzz("header", shards(), read, "x.safetensors")


# Locks and indexes

MODEL = {
    "model_type": "deepseek_v3",
    "architectures": ["DeepseekV3ForCausalLM"],
    "vocab_size": 32,
    "hidden_size": 16,
    "intermediate_size": 32,
    "moe_intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "n_group": 2,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
    "num_nextn_predict_layers": 0,
}
SHAPES = {"model.embed_tokens.weight": [32, 16], "model.norm.weight": [16], "lm_head.weight": [32, 16]}
for block in range(2):
    SHAPES |= {f"model.layers.{block}.{name}": shape for name, shape in block_shapes(MODEL, block).items()}


def located() -> dict[str, TensorEntry]:
    """The model's tensors, one behind the other in one shard."""
    found, at = {}, 100
    for name, shape in SHAPES.items():
        found[name] = TensorEntry(dtype="BF16", shape=shape, shard="model.safetensors", offset=at)
        at += 2 * int(np.prod(shape))
    return found


LOCK = {
    "model": "tiny",
    "revision": "0" * 40,
    "files": {name: {"size": 100_000, "sha256": "a" * 64} for name in ("config.json", "model.safetensors")},
    "tensors": {name: entry.model_dump() for name, entry in located().items()},
    "config": MODEL,
}


def test_locks(tmp_path):
    path = tmp_path / "tiny.json"

    def read(data):
        path.write_bytes(data)
        lock = load_lock(path)
        assert isinstance(lock, Lock)
        for entry in lock.tensors.values():
            assert 0 <= entry.offset <= lock.files[entry.shard].size and all(extent >= 0 for extent in entry.shape)
        for name, entry in lock.files.items():
            assert Path(name).name == name and name not in ("", "..") and int(entry.sha256, 16) >= 0 <= entry.size

    fuzz("lock", texts_of(LOCK), read, str(path))


def test_indexes(tmp_path):
    index = {"metadata": {"total_size": 9}, "weight_map": dict.fromkeys(TENSORS, "model.safetensors")}
    (tmp_path / "config.json").write_text(json.dumps(MODEL))
    (tmp_path / "model.safetensors").write_bytes(SAVED)
    headers = header_of(io.BytesIO(SAVED), len(SAVED), Path("model.safetensors"))

    def read(data):
        (tmp_path / INDEX).write_bytes(data)
        checkpoint = Checkpoint(tmp_path)
        for shard in checkpoint.shards:
            assert (tmp_path / shard).parent == tmp_path and shard not in ("", "..")
        index_agrees(tmp_path, checkpoint.stored, headers)
        assert checkpoint.stored == dict.fromkeys(TENSORS, "model.safetensors")

    fuzz("index", texts_of(index), read, str(tmp_path))


# config.json: all that planning reckons with it


def planned(directory: Path, tensors: dict[str, TensorEntry]) -> None:
    config = Checkpoint(directory).config
    check_model(str(directory), config, tensors)
    blocks = block_count(config)
    assert 1 <= blocks <= 1000 and family(config) in FAMILIES.values()
    for entry in entries(tensors, config).values():
        assert all(extent > 0 for extent in entry.shape)
    release = Release(model="tiny", scheme="NVFP4")
    for stage in (
        lambda: check_group("tiny-nvfp4", release, config),
        lambda: check_context("tiny", Calibration(seqlen=32), "tiny", config),
        lambda: 0 < kept_experts("tiny", Prune(ratio=0.5), config) < 10_000,
    ):
        try:
            assert stage() is not False
        except RequantError as error:
            assert "tiny" in str(error) and str(error).isprintable()
    assert cache_bytes_per_token(config, 1) > 0
    sizes = reference_files("tiny", "tiny", "tiny", Calibration(seqlen=32), config, True)
    assert len(sizes) >= blocks and min(sizes.values()) > 0


def test_config_json(tmp_path):
    def read(data):
        (tmp_path / "config.json").write_bytes(data)
        planned(tmp_path, located())

    fuzz("config.json", texts_of(MODEL), read, str(tmp_path))


# The build's own config

CONFIG = {
    "models": {"m": {"path": "m"}, "p": {"from": "m", "prune": {"ratio": 0.5, "calibration": "c"}}},
    "calibrations": {"c": {"sources": [{"path": "a.txt", "share": 0.5}], "nsamples": 4, "heldout": {"nsamples": 2}}},
    "benchmarks": {"b": {"tasks": ["t"], "limit": 3}},
    "targets": {"t": {"engine": "vllm", "device": "cuda", "gpu": "sm120", "memory_gb": 96.0}},
    "releases": {
        "r": {
            "model": "m",
            "scheme": "NVFP4",
            "calibration": "c",
            "benchmark": "b",
            "keep": ["kv_b_proj$"],
            "tuning": {"iters": 2, "lr": 0.1},
            "verify": {"cosine": 0.9},
            "deploy": {"target": "t"},
        },
        "s": {"model": "p", "scheme": "W3A16"},
    },
    "build": ["r", "s"],
    "device": "cpu",
}


def test_configs():
    def read(data):
        config = parse(data)
        for name in config.build:
            release = config.releases[name]
            assert release.model in config.models and release.calibration in config.calibrations
            assert release.benchmark in config.benchmarks and release.deploy.target in config.targets
            assert 0 <= release.tuning.iters <= 50_000 and 0 < release.deploy.agreement <= 1
        for calibration in config.calibrations.values():
            assert all(0 < source.share < float("inf") for source in calibration.sources)
        assert json.dumps(config.model_dump(mode="json"), allow_nan=False)

    fuzz("config", changed(CONFIG, VALUES | st.dictionaries(st.integers(0, 3), SCALARS, max_size=2)), read, "config: ")

"""Checkpoints, locks, configs and texts that are wrong: each ends in one line, and nothing changes on disk."""

import json
import os
import shutil
from pathlib import Path

import pytest
import tiny
from bad_input import edit_header, edit_json, refused, write_header

from requant.architecture import block_of
from requant.calibration import make_token_sets
from requant.checkpoint import INDEX, Checkpoint
from requant.config import Calibration, parse
from requant.locks import check_file, load_lock, make_lock, tensors_of
from requant.planning import check_locked_source, text_files
from requant.preflight import check_model, check_source
from requant.records import write_json

DEEP = b'{"a":' + b"[" * 50_000 + b"]" * 50_000 + b"}"
NORM = "model.norm.weight"


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    folder = tiny.write_checkpoint(tmp_path_factory.mktemp("bad") / "moe", "deepseek_v3", shard_size="1MB")
    shards = sorted(folder.glob("*.safetensors"))
    for number, shard in enumerate(shards, 1):
        assert shard.name == f"model-{number:05}-of-{len(shards):05}.safetensors"
    return folder


@pytest.fixture
def source(original, tmp_path):
    tensors_of.cache_clear()
    return shutil.copytree(original, tmp_path / "moe")


def first_shard(source: Path) -> Path:
    return min(source.glob("*.safetensors"))


def plan(source: Path) -> None:
    """What planning does with a checkpoint that has no lock."""
    checkpoint = Checkpoint(source)
    tensors = tensors_of(str(source))
    check_model(str(source), checkpoint.config, tensors)
    blocks = checkpoint.config["num_hidden_layers"]
    check_source("moe", {block_of(name, blocks) for name in tensors}, blocks, checkpoint.files)


def test_the_checkpoint_that_all_cases_start_from_is_good(source):
    plan(source)


# Shards


def replaced(make):
    """The first shard gives way to what `make` makes in its place."""

    def change(source):
        shard = first_shard(source)
        shard.unlink()
        make(shard)

    return change


def header(change):
    return lambda source: edit_header(first_shard(source), change)


def tensor(**fields):
    """Fields of the first tensor in the first shard's header."""

    def change(found):
        name = min((name for name in found if name != "__metadata__"), key=lambda name: found[name]["data_offsets"])
        found[name].update(fields)

    return header(change)


def shifted(by):
    """All tensors of the first shard but the first begin and end `by` bytes later."""

    def change(found):
        found.pop("__metadata__", None)
        entries = sorted(found.values(), key=lambda entry: entry["data_offsets"])
        for entry in entries[1:]:
            entry["data_offsets"] = [at + by for at in entry["data_offsets"]]

    return header(change)


def appended(data):
    return lambda source: first_shard(source).write_bytes(first_shard(source).read_bytes() + data)


def sparse(shard):
    """A header of just over the format's limit, in a file that is long enough for it."""
    write_header(shard, b"{}", length=100_000_001)
    os.truncate(shard, 100_000_100)


def twice(shard):
    entry = b'"a":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}'
    write_header(shard, b"{" + entry + b"," + entry + b"}")


SHARDS = {
    "is missing": (replaced(lambda shard: None), f"{INDEX} names it"),
    "is a directory": (replaced(Path.mkdir), "a directory found; expected a safetensors file"),
    "is a FIFO": (replaced(os.mkfifo), "a FIFO found; expected a safetensors file"),
    "is a link to nothing": (replaced(lambda shard: shard.symlink_to("gone")), "not there"),
    "is a link to itself": (replaced(lambda shard: shard.symlink_to(shard.name)), "not there"),
    "is empty": (replaced(Path.touch), "not a whole safetensors file"),
    "header longer than the file": (replaced(lambda s: write_header(s, b"{}", length=10**6)), "header claims 1000000"),
    "header of 2^64 - 1 bytes": (replaced(lambda s: write_header(s, b"{}", length=2**64 - 1)), "header claims 1844"),
    "header of 0 bytes": (replaced(lambda shard: write_header(shard, b"")), "its header: no JSON"),
    "header over the limit": (replaced(sparse), "100000001 bytes; expected 100000000 at most"),
    "header cut by its length": (replaced(lambda s: write_header(s, b'{"a":1}', length=5)), "its header: no JSON"),
    "header is no JSON": (replaced(lambda shard: write_header(shard, b"BF16!")), "its header: no JSON"),
    "header is no UTF-8": (replaced(lambda shard: write_header(shard, b'{"\xff":1}')), "its header: no JSON"),
    "header is a list": (header(lambda found: [found]), "its header: a list found"),
    "header nests deeply": (replaced(lambda shard: write_header(shard, DEEP)), "recursion limit"),
    "header has a key twice": (replaced(twice), "the key 'a' stands there twice"),
    "metadata is no text": (header(lambda found: found.update(__metadata__={"a": 1})), "__metadata__"),
    "entry is a list": (header(lambda found: found.update({"x": [1]})), "x: [1] found; expected dtype, shape"),
    "entry has no offsets": (header(lambda found: found.update({"x": {"dtype": "BF16"}})), "expected dtype, shape"),
    "tensors overlap": (shifted(-2), "found; expected"),
    "a hole between tensors": (shifted(2), "found; expected"),
    "bytes behind the last tensor": (appended(b"\0\0"), "cut short or padded"),
    "tensor beyond the end": (tensor(data_offsets=[0, 10**9]), "bytes 0..1000000000 found"),
    "offsets the wrong way": (tensor(data_offsets=[10, 2]), "bytes 10..2 found"),
    "offsets negative": (tensor(data_offsets=[-2, 2]), "expected [begin, end]"),
    "offsets of three": (tensor(data_offsets=[0, 1, 2]), "expected [begin, end]"),
    "shape of another size": (tensor(shape=[1, 1]), "for BF16 [1, 1]"),
    "shape negative": (tensor(shape=[-1, 4]), "shape [-1, 4] found"),
    "shape huge": (tensor(shape=[2**62, 2**62]), "for BF16 [4611686018427387904"),
    "shape beyond 64 bits": (tensor(shape=[2**64]), "shape [18446744073709551616] found"),
    "shape of fractions": (tensor(shape=[1.5, 2]), "shape [1.5, 2] found"),
    "shape is a text": (tensor(shape="BF16"), "shape 'BF16' found"),
    "dtype unknown": (tensor(dtype="F4"), "dtype 'F4' found; expected one of F64"),
    "dtype is a list": (tensor(dtype=["BF16"]), "dtype ['BF16'] found"),
    "dtype not read": (tensor(dtype="I16"), "is stored in I16; expected BF16, F16, F32"),
    "name with a line break": (header(lambda f: f.update({"a\nb": {}})), r"'a\nb': expected a tensor's name"),
    "name of 10,000 characters": (header(lambda f: f.update({"a" * 10_000: {}})), "expected a tensor's name"),
}


@pytest.mark.parametrize("case", SHARDS)
def test_a_shard_that(case, source, tmp_path):
    damage, part = SHARDS[case]
    damage(source)
    with refused(tmp_path, str(source), "" if case == "dtype not read" else first_shard(source).name[:9], part):
        plan(source)


# Index and pickles


def weight_map(change):
    return lambda source: edit_json(source / INDEX, lambda index: change(index["weight_map"]))


def named(shard):
    return weight_map(lambda found: found.update({NORM: shard}))


def only_pickles(source):
    for shard in source.glob("*.safetensors"):
        shard.unlink()
    (source / INDEX).unlink()
    (source / "pytorch_model.bin").write_bytes(b"\x80\x04.")


def without_index(source):
    (source / INDEX).unlink()


def another_shard(source):
    index = json.loads((source / INDEX).read_text())["weight_map"]
    named(next(shard for shard in sorted(set(index.values())) if shard != index[NORM]))(source)


INDEXES = {
    "names a tensor of no shard": (weight_map(lambda f: f.update({"ghost": f[NORM]})), "ghost: found in no shard"),
    "leaves a tensor out": (weight_map(lambda found: found.pop(NORM) and None), f"{NORM} is in a shard"),
    "names another shard": (another_shard, f"{NORM}: found in model-"),
    "names a file above": (named("../x.safetensors"), "'../x.safetensors'; expected a file name without a path"),
    "names an absolute path": (named("/etc/x.safetensors"), "expected a file name without a path"),
    "names the directory above": (named(".."), "'..'; expected a file name without a path"),
    "names a file with a NUL": (named("a\0b"), "expected a file name without a path"),
    "names no text": (named(7), "shard 7; expected a file name"),
    "names pickled weights": (named("pytorch_model.bin"), "'pytorch_model.bin'; expected a safetensors file"),
    "has no weight_map": (lambda source: edit_json(source / INDEX, lambda f: {"metadata": {}}), "`weight_map`: found"),
    "has a list": (lambda source: edit_json(source / INDEX, lambda f: {"weight_map": [1]}), "`weight_map`: found [1]"),
    "is empty": (lambda source: (source / INDEX).write_bytes(b""), f"{INDEX}: no JSON"),
    "has a key twice": (
        lambda source: (source / INDEX).write_text('{"weight_map": {"a": "x", "a": "y"}}'),
        "the key 'a' stands there twice",
    ),
    "is missing beside shards": (without_index, "safetensors files and no"),
    "is missing beside pickles": (only_pickles, "pytorch_model.bin: pickled weights are not read"),
}


@pytest.mark.parametrize("case", INDEXES)
def test_an_index_that(case, source, tmp_path):
    damage, part = INDEXES[case]
    damage(source)
    with refused(tmp_path, str(source), part):
        plan(source)


def test_pickles_beside_safetensors_are_no_part_of_the_model(source):
    (source / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    (source / "training_args.bin").write_bytes(b"\x80\x04.")
    plan(source)
    assert [name for name in Checkpoint(source).files if name.endswith(".bin")] == []


def test_shards_may_be_links_to_elsewhere_as_in_the_cache_of_the_hub(source, tmp_path):
    shard = first_shard(source)
    shard.rename(tmp_path / "blob")
    shard.symlink_to(tmp_path / "blob")
    plan(source)


def test_a_file_that_may_not_be_read_is_named(source, tmp_path, monkeypatch):
    """The refusal is a stand-in: tests that run as root may read everything."""

    def refuse(path, mode="r", **keys):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr("requant.untrusted.open", refuse, raising=False)
    with refused(tmp_path, f"{source}/config.json: can't be read (Permission denied)"):
        plan(source)


# config.json


def numbers(**changes):
    return lambda source: tiny.edit_config(source, **changes)


def written(data):
    return lambda source: (source / "config.json").write_bytes(data)


def in_place(make):
    def change(source):
        (source / "config.json").unlink()
        make(source / "config.json")

    return change


def without_head(source):
    shard = json.loads((source / INDEX).read_text())["weight_map"]["lm_head.weight"]
    edit_header(source / shard, lambda found: found.update({"other.weight": found.pop("lm_head.weight")}))
    weight_map(lambda found: found.update({"other.weight": found.pop("lm_head.weight")}))(source)


def without_tokenizer(source):
    (source / "tokenizer.json").unlink()


CONFIGS = {
    "is missing": (in_place(lambda path: None), "config.json: not there; expected a Hugging Face checkpoint directory"),
    "is a directory": (in_place(Path.mkdir), "config.json: a directory found"),
    "is a FIFO": (in_place(os.mkfifo), "config.json: a FIFO found"),
    "is a device": (in_place(lambda path: path.symlink_to("/dev/zero")), "config.json: a device found"),
    "is a link to itself": (in_place(lambda path: path.symlink_to("config.json")), "can't be read (Too many levels"),
    "is empty": (written(b""), "config.json: no JSON: EOF"),
    "begins with a mark": (
        written(b"\xef\xbb\xbf{}"),
        "config.json: no JSON: it begins with a byte order mark; expected",
    ),
    "is a list": (written(b"[1]"), "config.json: a list found; expected a Hugging Face"),
    "is cut": (written(b'{"a": '), "config.json: no JSON"),
    "is no UTF-8": (written(b'{"a": "\xff"}'), "config.json: no JSON"),
    "has NaN": (written(b'{"a": NaN}'), "config.json: no JSON"),
    "has an infinite number": (written(b'{"a": 1e999}'), "the number '1e999' is too large"),
    "has a number of 10 MB": (written(b'{"a": ' + b"9" * 10**7 + b"}"), "config.json: no JSON: number out of range"),
    "has a key twice": (written(b'{"a": 1, "a": 2}'), "the key 'a' stands there twice"),
    "nests 50,000 deep": (written(DEEP), "config.json: no JSON: recursion limit exceeded"),
    "has half a character": (written(b'{"a": "\\ud800"}'), "config.json: no JSON"),
    "is over 100 MB": (lambda s: os.truncate(s / "config.json", 10**8 + 1), "expected a Hugging Face"),
    "has no model_type": (numbers(model_type=None), "model_type: None (DeepseekV3ForCausalLM) is unknown"),
    "has a list as model_type": (numbers(model_type=["llama"]), "model_type: ['llama']"),
    "has a text as architectures": (numbers(architectures="X"), "architectures: 'X'; expected names of classes"),
    "has no layer": (numbers(num_hidden_layers=0), "num_hidden_layers: 0; expected a number of 1 or more"),
    "has a billion layers": (numbers(num_hidden_layers=10**9), "num_hidden_layers: 1000000000; expected"),
    "has true layers": (numbers(num_hidden_layers=True), "num_hidden_layers: True; expected a number"),
    "has more layers than tensors": (numbers(num_hidden_layers=4), "block 3 has no tensors"),
    "has a negative width": (numbers(hidden_size=-128), "hidden_size: -128; expected a number of 1 or more"),
    "has a huge width": (numbers(hidden_size=2**40), "hidden_size: 1099511627776; expected"),
    "has half a head": (numbers(num_attention_heads=2.5), "num_attention_heads: 2.5; expected"),
    "has more heads than width": (
        numbers(num_attention_heads=200, head_dim=None),
        "num_attention_heads: 200; expected",
    ),
    "has no latent width": (numbers(qk_rope_head_dim=None), "qk_rope_head_dim: None; expected a number"),
    "has a billion experts": (numbers(n_routed_experts=10**9), "n_routed_experts: 1000000000; expected"),
    "chooses more experts than there are": (numbers(num_experts_per_tok=9), "num_experts_per_tok: 9; expected 8 or"),
    "has more groups than experts": (numbers(n_group=16), "n_group: 16; expected 8 or less"),
    "chooses more groups than there are": (numbers(topk_group=5), "topk_group: 5; expected 4 or less"),
    "has another vocabulary": (numbers(vocab_size=999), "model.embed_tokens.weight: [320, 128] found"),
    "has no head": (without_head, "lm_head.weight: 'no such tensor' found"),
    "has no tokenizer beside it": (without_tokenizer, "models.moe: no tokenizer; expected tokenizer.json"),
    "has a list as quantization": (numbers(quantization_config=[]), "quantization_config: []; expected keys"),
    "has another quantization": (numbers(quantization_config={"quant_method": "awq"}), "quant_method: 'awq'; expected"),
    "has blocks of no size": (
        numbers(quantization_config={"quant_method": "fp8", "weight_block_size": [0, 128]}),
        "weight_block_size: [0, 128]; expected [rows, columns]",
    ),
}


@pytest.mark.parametrize("case", CONFIGS)
def test_a_config_json_that(case, source, tmp_path):
    damage, part = CONFIGS[case]
    damage(source)
    with refused(tmp_path, "models.moe" if part.startswith("models") else str(source), part):
        plan(source)


# Locks


@pytest.fixture(scope="module")
def good_lock(original, tmp_path_factory):
    path = tmp_path_factory.mktemp("locks") / "moe.json"
    write_json(path, make_lock("moe", original))
    return path


def entry(**changes):
    """Fields of the final norm in a lock's tensors."""
    return lambda lock: lock["tensors"][NORM].update(changes)


def first_file(**changes):
    return lambda lock: lock["files"]["config.json"].update(changes)


def renamed_file(name):
    return lambda lock: lock["files"].update({name: lock["files"]["config.json"]})


LOCKS = {
    "has an unknown key": (lambda lock: lock.update(extra=1), "extra: Extra inputs are not permitted"),
    "lacks a key": (lambda lock: lock.pop("tensors") and None, "tensors: Field required"),
    "is a list": (lambda lock: [lock], "a list found"),
    "has a list of files": (lambda lock: lock.update(files=[]), "files: Input should be"),
    "names a file above": (renamed_file("../config.json"), "files: '../config.json'; expected a file name"),
    "names an absolute file": (renamed_file("/etc/passwd"), "files: '/etc/passwd'; expected a file name"),
    "has a short hash": (first_file(sha256="abc"), "config.json: sha256 'abc'; expected 64 hex digits"),
    "has a hash in capitals": (first_file(sha256="A" * 64), "expected 64 hex digits"),
    "has a negative size": (first_file(size=-1), "config.json: size -1; expected a number of bytes"),
    "has a size that is a text": (first_file(size="big"), "files.config.json.size: Input should be a valid integer"),
    "has a branch as revision": (lambda lock: lock.update(revision="main"), "revision: 'main'; expected a commit"),
    "has a tensor in no file": (entry(shard="x.safetensors"), f"'{NORM}': shard 'x.safetensors'; expected one of"),
    "has a tensor beyond its file": (entry(offset=10**9), "bytes 1000000000..1000000256; expected some of"),
    "has a tensor before its file": (entry(offset=-1), "bytes -1..255; expected some of"),
    "has a negative shape": (entry(shape=[-1]), "shape [-1]; expected numbers of 0 or more"),
    "has an unknown dtype": (entry(dtype="F4"), "dtype 'F4'; expected one of F64"),
}


@pytest.mark.parametrize("case", LOCKS)
def test_a_lock_that(case, good_lock, tmp_path):
    path = Path(shutil.copy(good_lock, tmp_path / "moe.json"))
    change, part = LOCKS[case]
    edit_json(path, change)
    with refused(tmp_path, str(path), part, "make it anew by the job `lock`"):
        load_lock(path)


@pytest.mark.parametrize(
    ("make", "part"),
    [
        (Path.mkdir, "a directory found"),
        (os.mkfifo, "a FIFO found"),
        (Path.touch, "no JSON: EOF"),
        (lambda path: path.write_bytes(DEEP), "recursion limit"),
        (lambda path: path.write_text('{"model": "a", "model": "b"}'), "the key 'model' stands there twice"),
        (lambda path: path.write_text('{"model": "\x00"'), "no JSON: control character"),
        (lambda path: None, "not there; expected a Lock"),
    ],
)
def test_a_lock_file_that_is_none_is_named(make, part, tmp_path):
    make(tmp_path / "moe.json")
    with refused(tmp_path, str(tmp_path / "moe.json"), part):
        load_lock(tmp_path / "moe.json")


def test_files_that_differ_from_a_lock_are_named(source, good_lock, tmp_path):
    lock, shard = load_lock(good_lock), first_shard(source)
    raw = bytearray(shard.read_bytes())
    raw[-1] ^= 1
    shard.write_bytes(raw)
    with refused(tmp_path, f"{shard}: sha256", "the lock of moe expects"):
        check_file(source, shard.name, lock)
    shard.unlink()
    shard.mkdir()
    with refused(tmp_path, f"{shard}: no file; locks/moe.json names it"):
        check_locked_source("moe", str(source), "locks/moe.json", [shard.name])


# The build's config

GOOD = {
    "models": {"m": {"path": "m"}},
    "calibrations": {"c": {"sources": [{"path": "a.txt"}], "nsamples": 4}},
    "releases": {"r": {"model": "m", "scheme": "NVFP4", "calibration": "c"}},
    "build": ["r"],
}
BUILDS = {
    "nothing": ({}, "models: missing"),
    "a release of no model": ({"releases": {"r": {"model": "x", "scheme": "NVFP4"}}}, "'x' is not in `models`"),
    "an unknown key": ({"modles": {}}, "modles: unknown key"),
    "a list of models": ({"models": ["m"]}, "models: ['m']; expected"),
    "a number as path": ({"models": {"m": {"path": 3}}}, "models.m.path: 3; expected"),
    "a path of no characters": ({"models": {"m": {"path": ""}}}, "models.m.path: ''; expected"),
    "a name with a path": ({"models": {"../m": {"path": "m"}, "m": {"path": "m"}}}, "models.../m: names have letters"),
    "a name of 300 characters": ({"models": {"m": {"path": "m"}, "n" * 300: {"path": "m"}}}, "100 at most"),
    "a share of infinity": (
        {"calibrations": {"c": {"sources": [{"path": "a", "share": float("inf")}]}}},
        "calibrations.c.sources.0.share: inf; expected: a finite number",
    ),
    "a share of no number": (
        {"calibrations": {"c": {"sources": [{"path": "a", "share": float("nan")}]}}},
        "calibrations.c.sources.0.share: nan; expected: a finite number",
    ),
    "true samples": ({"calibrations": {"c": {"nsamples": True}}}, "calibrations.c.nsamples: True; expected"),
    "a seed of 2^32": ({"calibrations": {"c": {"seed": 2**32}}}, "calibrations.c.seed: 4294967296; expected"),
    "samples of a billion tokens": ({"calibrations": {"c": {"seqlen": 10**9}}}, "calibrations.c.seqlen: 1000000000"),
    "a value of 1 MB": ({"benchmarks": {"b": {"tasks": "x" * 10**6}}}, "benchmarks.b.tasks: 'xxx"),
    "a pattern that overflows": (
        {"releases": {"r": {"model": "m", "scheme": "NVFP4", "calibration": "c", "keep": ["a{99999999999}"]}}},
        "is not a regular expression",
    ),
    "a model pruned from none": (
        {"models": {"m": {"from": "x", "prune": {"ratio": 0.5, "calibration": "c"}}}},
        "models.m.from: 'x' is not in `models`",
    ),
    "a ratio of 1": (
        {"models": {"m": {"path": "m"}, "p": {"from": "m", "prune": {"ratio": 1}}}},
        "models.p.prune.ratio: 1; expected: less than 1",
    ),
}


@pytest.mark.parametrize("case", BUILDS)
def test_a_config_of(case, tmp_path):
    change, part = BUILDS[case]
    with refused(tmp_path, "config: ", part):
        parse(GOOD | change if change else {"releases": GOOD["releases"], "build": ["r"]})


def test_a_config_with_many_errors_says_some_of_them():
    lines = []
    try:
        parse(GOOD | {f"key{number}": 0 for number in range(1000)})
    except Exception as error:
        lines = str(error).split("\n")
    assert len(lines) == 21 and lines[-1] == "config: and 980 more like these"


# Calibration text and tokenizer


def text(data, suffix=".txt"):
    """A text file of these bytes."""

    def make(folder):
        path = folder / f"text{suffix}"
        path.write_bytes(data)
        return path

    return make


def special(make_it):
    def make(folder):
        make_it(folder / "text.txt")
        return folder / "text.txt"

    return make


TEXTS = {
    "is empty": (text(b""), "0 tokens in 0 documents found"),
    "has blank lines only": (text(b"\n\n \n\n"), "0 tokens in 0 documents found"),
    "is too short": (text(b"the cat sat on the mat"), "calibration of 8 samples of 32 tokens expects 256 tokens"),
    "is no UTF-8": (text(b"the cat \xff sat"), "not UTF-8 at byte 8"),
    "is UTF-16": (text("the cat".encode("utf-16")), "UTF-16 found; expected UTF-8 text"),
    "is missing": (special(lambda path: None), "not there; expected the text of calibration source 'text'"),
    "is a directory": (special(Path.mkdir), "a directory found; expected the text"),
    "is a FIFO": (special(os.mkfifo), "a FIFO found; expected the text"),
    "has a broken line": (text(b'{"text": "a"}\n{"text": \n', ".jsonl"), "line 2: no JSON"),
    "has a line that is a list": (text(b'["a"]\n', ".jsonl"), "line 1: a list found; expected a JSON object"),
    "has a line without the key": (text(b'{"body": "a"}\n', ".jsonl"), "line 1: ['body'] found"),
    "has a line with a number": (text(b'{"text": 3}\n', ".jsonl"), "line 1: 'text' is no text"),
    "has half a character": (text(b'{"text": "\\ud800"}\n', ".jsonl"), "line 1: no JSON"),
    "nests deeply": (text(DEEP + b"\n", ".jsonl"), "line 1: no JSON: recursion limit"),
    "has a key twice in a line": (text(b'{"text": "a", "text": "b"}\n', ".jsonl"), "line 1: no JSON: the key 'text'"),
}


def tokenize(source: Path, path: Path, folder: Path) -> None:
    settings = Calibration(sources=[{"path": str(path), "name": "text"}], nsamples=8, seqlen=32)
    make_token_sets("moe", source, "c", settings, folder / "tokens.safetensors", folder / "calibration.json")


@pytest.mark.parametrize("case", TEXTS)
def test_a_text_that(case, original, tmp_path):
    make, part = TEXTS[case]
    path = make(tmp_path)
    with refused(tmp_path, str(path), part):
        tokenize(original, path, tmp_path)


def test_a_text_that_is_none_is_noticed_when_planned(tmp_path):
    (tmp_path / "text.txt").mkdir()
    settings = {"sources": [{"path": str(tmp_path / "text.txt")}], "heldout": {"sources": None}}
    with refused(tmp_path, f"{tmp_path}/text.txt: no file; expected one (calibrations.c.sources[0].path)"):
        text_files("c", settings)


def add_tokens(source: Path) -> None:
    def change(found):
        found["added_tokens"].append(found["added_tokens"][-1] | {"id": 400, "content": "<more>"})

    edit_json(source / "tokenizer.json", change)


def beyond(key: str):
    """The token beyond the embedding is the one that tokenizer_config.json has under `key`."""

    def damage(source):
        add_tokens(source)
        edit_json(source / "tokenizer_config.json", lambda found: found.update({key: "<more>"}))

    return damage


BEYOND = "config.json has a vocabulary of 320: expected the tokenizer that the model was trained with"
TOKENIZERS = {
    "ends texts by a token beyond the embedding": (beyond("eos_token"), f"eos_token: token 320, '<more>'; {BEYOND}"),
    "pads by a token beyond the embedding": (beyond("pad_token"), f"pad_token: token 320, '<more>'; {BEYOND}"),
    "has a template with a token beyond the embedding": (
        lambda source: (add_tokens(source), (source / "chat_template.jinja").write_text("<more>{{ messages }}")),
        f"chat template: token 320, '<more>'; {BEYOND}",
    ),
    "is empty": (lambda source: (source / "tokenizer.json").write_text(""), "no tokenizer can be made of its files"),
    "is another file": (
        lambda source: shutil.copy(source / "config.json", source / "tokenizer.json"),
        "no tokenizer can be made of its files",
    ),
    "is missing": (without_tokenizer, "no tokenizer.json, tokenizer.model, tiktoken.model or vocab.json; expected one"),
}


@pytest.mark.parametrize("case", TOKENIZERS)
def test_a_tokenizer_that(case, source, tmp_path):
    damage, part = TOKENIZERS[case]
    damage(source)
    path = tiny.write_text(tmp_path / "text.txt", 300)
    with refused(tmp_path, str(source), part):
        tokenize(source, path, tmp_path)


def test_there_are_sixty_cases_and_more():
    tables = (SHARDS, INDEXES, CONFIGS, LOCKS, BUILDS, TEXTS, TOKENIZERS)
    assert sum(map(len, tables)) >= 60

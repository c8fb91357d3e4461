"""What is stale after which change: each line of the table in docs/reproducibility.md, on a finished build.

A line is an edit, undone afterwards, and the jobs by rule that the build then would run, all of them.
"""

import contextlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import yaml
from building import BRIEF, ROOT, Build

TABLE = (ROOT / "docs/reproducibility.md").read_text(encoding="utf-8").partition("## What is stale")[2]
TABLE = TABLE.partition("\n## ")[0]
ROWS = re.findall(r"^\| (?!you change|---)(.+?) \| (.+?) \|$", TABLE, re.MULTILINE)

CARD = {"plot_build": 1, "plot_experts": 1, "card": 1}
RELEASES, BLOCKS, MODELS = 4, 3, 3


def cards(releases: int) -> dict[str, int]:
    """The cards, where records of so many releases are new, with the hashes and signatures of these."""
    return {"release_card": releases, "checksums": releases, "sign": releases, **CARD}


def described(releases: int) -> dict[str, int]:
    """The cards and the provenance, where settings of so many releases are new."""
    return {"provenance": releases, **cards(releases)}


def packed(releases: int) -> dict[str, int]:
    """All that is made of so many packed releases."""
    stages = ("pack", "verify", "evaluate", "deploy", "benchmark", "eval_results", "plot_release")
    return dict.fromkeys(stages, releases) | described(releases)


def made(releases: int) -> dict[str, int]:
    """All that is made of the blocks of so many releases, the first ones among them."""
    return {"load_test": releases} | packed(releases)


@dataclass(frozen=True)
class Place:
    """A finished build and a copy of the checkout that it can be planned from; both are put back after an edit."""

    build: Build
    checkout: Path
    saved: dict[Path, tuple[bytes | None, int, int]] = field(default_factory=dict)

    def at(self, path: str) -> Path:
        return self.build.directory / path

    def save(self, path: Path) -> Path:
        """Remembers a file as it is."""
        if path.exists():
            found = path.stat()
            self.saved.setdefault(path, (path.read_bytes(), found.st_atime_ns, found.st_mtime_ns))
        else:
            self.saved.setdefault(path, (None, 0, 0))
        return path

    def change(self, path: Path, old: bytes, new: bytes) -> None:
        """Replaces what stands in a file, in place."""
        content = self.save(path).read_bytes()
        assert old in content
        path.write_bytes(content.replace(old, new, 1))

    def flip(self, path: Path) -> None:
        """Changes the last byte of a file, in place."""
        content = self.save(path).read_bytes()
        path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))

    def config(self, change: Callable[[dict], object]) -> None:
        self.save(self.at("mine.yaml"))
        self.build.configure(change)

    def release(self, name: str, **settings: object) -> None:
        self.config(lambda data: data["releases"][name].update(settings))

    def remove(self, *paths: str) -> None:
        """Moves files away; a hard link stays one when it comes back."""
        for path in map(self.at, paths):
            path.rename(path.with_name(f"{path.name}.away"))

    def touch(self, *paths: Path) -> None:
        for path in paths:
            os.utime(self.save(path))

    def module(self, name: str, old: str, new: str) -> None:
        self.change(self.checkout / "src/requant" / name, old.encode(), new.encode())

    def restore(self) -> None:
        for path, (content, accessed, modified) in self.saved.items():
            if content is None:
                path.unlink(missing_ok=True)
            else:
                if path.read_bytes() != content:
                    path.write_bytes(content)
                os.utime(path, ns=(accessed, modified))
        for path in self.build.directory.glob("results/**/*.away"):
            path.rename(path.with_name(path.name.removesuffix(".away")))
        shutil.rmtree(self.checkout / "site", ignore_errors=True)
        self.saved.clear()

    def planned(self, *arguments: str) -> dict[str, int]:
        return self.build.planned("model_card.md", "--snakefile", str(self.checkout / "Snakefile"), *arguments)


@pytest.fixture(scope="module")
def copied(built, tmp_path_factory) -> Place:
    """The checkout in another place, all of its files new."""
    checkout = tmp_path_factory.mktemp("checkout")
    for name in ("Snakefile", "config.yaml", "flake.lock"):
        shutil.copy(ROOT / name, checkout / name)
    for name in ("src", "rules", "scripts", "report", "profiles", "config", "demo", "envs", "benchmarks"):
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / name, checkout / name, ignore=ignored, copy_function=shutil.copy)
    return Place(built, checkout)


@pytest.fixture
def place(copied) -> Iterator[Place]:
    """The finished build, put back when the test ends."""
    with contextlib.ExitStack() as stack:
        stack.callback(copied.restore)
        yield copied


def install(place: Place, name: str) -> None:
    """Another version of a distribution comes first on the path of a build."""
    folder = place.checkout / "site" / f"{name.replace('-', '_')}-99.0.dist-info"
    folder.mkdir(parents=True, exist_ok=True)
    place.save(folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 99.0\n")
    place.save(folder / "top_level.txt").write_text(name.replace("-", "_") + "\n")


def touch_everything(place: Place) -> None:
    inputs = [path for name in ("models", "text") for path in place.at(name).rglob("*") if path.is_file()]
    released = list(place.at("results/ds-w3a16/model").glob("*.safetensors"))
    assert len(inputs) > 20 and len(released) == BLOCKS + 1
    place.touch(*inputs, *released, *(place.checkout / "scripts").iterdir(), place.at("mine.yaml"))


def reorder_config(place: Place) -> None:
    path = place.save(place.at("mine.yaml"))
    data = yaml.safe_load(path.read_text())
    path.write_text("# a comment\n" + yaml.safe_dump(dict(reversed(data.items())), sort_keys=False))


def comment_on_module(place: Place) -> None:
    place.module("quantize.py", '"""', '"""Words. ')
    place.module("reap.py", "import torch", "# A comment.\nimport torch")


def add_benchmark(place: Place) -> None:
    place.config(lambda data: data["benchmarks"].update(more=data["benchmarks"]["tiny"] | {"limit": 3}))
    place.release("ll-nvfp4", benchmark="more")


def change_tasks(place: Place) -> None:
    place.config(lambda data: data["benchmarks"]["tiny"].update(limit=3))


def change_share(place: Place) -> None:
    place.config(lambda data: data["calibrations"]["small"]["sources"][0].update(share=0.5))


def change_shard(place: Place) -> None:
    """The first shard of which block 1 holds a tensor and block 0 none."""
    index = json.loads(place.at("models/ds/model.safetensors.index.json").read_text())["weight_map"]
    shards = [
        {shard for name, shard in index.items() if name.startswith(f"model.layers.{block}.")} for block in range(3)
    ]
    place.flip(place.at(f"models/ds/{min(shards[1] - shards[0] - shards[2])}"))


def add_field(place: Place) -> None:
    place.module(
        "records.py",
        "class BlockRecord(StageRecord):",
        "class New(Record):\n    x: int\n\n\nclass BlockRecord(StageRecord):",
    )
    place.module("config.py", "import re\n", "import re\n\nNEW = 1\n")


def change_chain_too(place: Place) -> None:
    place.remove("results/ds-w3a16/blocks/2.safetensors", "results/ds-w3a16/chain/1.safetensors")


@dataclass(frozen=True)
class Line:
    """A row of the table, the edit that it names, and the jobs that run."""

    change: str
    runs: str
    edit: Callable[[Place], object]
    jobs: dict[str, int]
    options: tuple[str, ...] = ()


EVERYTHING = {
    "source_file": 35,
    "source": MODELS,
    "calibrate": MODELS,
    "embed": MODELS,
    "reference": MODELS * BLOCKS,
    "quantize": RELEASES * BLOCKS,
    "benchmark_source": MODELS,
    "sbom": RELEASES,
    **made(RELEASES),
}
TUNED = {"quantize": BLOCKS} | made(1)
LINES = [
    Line(
        "times only: sources, texts, scripts, packed shards, of any size",
        "nothing",
        touch_everything,
        {},
        ("--max-checksum-file-size", "0"),
    ),
    Line("a comment or the order of keys in the config", "nothing", reorder_config, {}),
    Line("a comment, docstring or line break in a module", "nothing", comment_on_module, {}),
    Line("the schema of config or records (any module with `COMPUTES = False`)", "nothing", add_field, {}),
    Line(
        "`tuning` of a release, say `iters`",
        "its blocks and everything after them; no other release, no reference chain",
        lambda place: place.release("ds-w3a16", tuning={"iters": 3, "batch_size": 4}),
        TUNED,
    ),
    Line(
        "`keep` of a release",
        "the same",
        lambda place: place.release("ds-w3a16", keep=["kv_b_proj$"]),
        TUNED,
    ),
    Line(
        "`verify` limits",
        "verify, provenance, cards",
        lambda place: place.release("ll-nvfp4", verify={"cosine": 0.9}),
        {"verify": 1} | described(1),
    ),
    Line(
        "`deploy` settings, the target",
        "load_test, deploy, provenance, cards",
        lambda place: place.release(
            "ll-nvfp4", deploy={"prompts": 3, "prompt_tokens": 12, "max_tokens": 4, "throughput": BRIEF}
        ),
        {"load_test": 1, "deploy": 1} | described(1),
    ),
    Line(
        "a benchmark added, for one release",
        "that benchmark of the release and of its source, provenance, cards",
        add_benchmark,
        {"benchmark_source": 1, "benchmark": 1, "eval_results": 0} | described(1),
    ),
    Line(
        "tasks of a benchmark",
        "benchmark of the releases that name it and of their sources, provenance, cards",
        change_tasks,
        {"benchmark_source": MODELS, "benchmark": RELEASES, "eval_results": 0} | described(RELEASES),
    ),
    Line(
        "`license` or `base_model` of a model",
        "provenance, cards",
        lambda place: place.config(lambda data: data["models"]["ll"].update(license="mit")),
        described(1),
    ),
    Line(
        "shares, seed or number of samples of a calibration",
        "calibrate, the reference chains on it, and every release on it",
        change_share,
        {"calibrate": 2, "embed": 2, "reference": 2 * BLOCKS, "quantize": 3 * BLOCKS} | made(3),
    ),
    Line(
        "a text of a calibration",
        "the same",
        lambda place: place.flip(place.at("text/b.txt")),
        {"calibrate": 2, "embed": 2, "reference": 2 * BLOCKS, "quantize": 3 * BLOCKS} | made(3),
    ),
    Line(
        "a shard of a source without a lock",
        "its check, the chain from the first block that it holds tensors of, the releases from there, the source's "
        "benchmark",
        change_shard,
        {"source_file": 1, "source": 1, "reference": 2, "quantize": 4, "benchmark_source": 1} | made(2),
    ),
    Line(
        "the module of the tuner",
        "blocks and everything after them",
        lambda place: place.module("tuned.py", "\nfrom", "\nNEW = 1\nfrom"),
        {"quantize": RELEASES * BLOCKS} | made(RELEASES),
    ),
    Line(
        "the module of the packer",
        "load_test, pack and everything after it",
        lambda place: place.module("packing.py", "import json", "NEW = 1\nimport json"),
        made(RELEASES),
    ),
    Line(
        "the module of the evaluation",
        "evaluate, deploy, pictures, cards",
        lambda place: place.module("evaluate.py", "import", "NEW = 1\nimport"),
        {"evaluate": RELEASES, "deploy": RELEASES, "plot_release": RELEASES} | cards(RELEASES),
    ),
    Line(
        "the module of the card",
        "cards and the pictures of the build",
        lambda place: place.module("card.py", "import", "NEW = 1\nimport"),
        cards(RELEASES),
    ),
    Line(
        "a template of the card",
        "cards and the pictures of the build",
        lambda place: place.module("templates/body.md.j2", "\n", "\n\n"),
        cards(RELEASES),
    ),
    Line(
        "the version of a library that draws (matplotlib)",
        "pictures, cards",
        lambda place: install(place, "matplotlib"),
        {"plot_release": RELEASES} | cards(RELEASES),
    ),
    Line(
        "the version of a library that tunes (auto-round)",
        "what imports it, and everything after it",
        lambda place: install(place, "auto-round"),
        {"quantize": RELEASES * BLOCKS} | made(RELEASES),
    ),
    Line(
        "the environment (`REQUANT_ENVIRONMENT`, which the flake sets), the version of Python",
        "everything",
        lambda place: None,
        EVERYTHING,
    ),
    Line(
        "a block file deleted",
        "that block and everything after it",
        lambda place: place.remove("results/ds-w3a16/blocks/1.safetensors"),
        {"quantize": 2} | made(1),
    ),
    Line(
        "a block file and hidden states of the release before it deleted",
        "from the last block whose hidden states are there",
        change_chain_too,
        {"quantize": 2} | made(1),
    ),
    Line(
        "a file of `results/{release}/model` deleted: shard, index, config, tokenizer",
        "pack and everything after it",
        lambda place: place.remove("results/ds-w3a16/model/model-00002-of-00004.safetensors"),
        packed(1),
    ),
    Line(
        "a record, card or picture of a release deleted",
        "its stage, and what is made of it",
        lambda place: place.remove("results/ll-nvfp4/verify.json"),
        {"verify": 1} | cards(1),
    ),
    Line(
        "the record of a load test deleted",
        "load_test, deploy, cards",
        lambda place: place.remove("results/ll-nvfp4/load_test.json"),
        {"load_test": 1, "deploy": 1} | cards(1),
    ),
]
ELSEWHERE = {
    "`prune.ratio`, `experts` or `method` of a pruned model": (
        "test_pruned.py",
        "test_another_ratio_observes_nothing_again_and_another_calibration_does",
    ),
    "`prune.calibration`": (
        "test_pruned.py",
        "test_another_ratio_observes_nothing_again_and_another_calibration_does",
    ),
    "a file of `results/{release}/model` changed by hand": (
        "test_stale.py",
        "test_a_file_changed_by_hand_stops_the_build_and_is_named",
    ),
}


@pytest.mark.parametrize("line", LINES, ids=lambda line: line.change)
def test_exactly_these_jobs_run_again(place, line, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", f"{place.checkout / 'site'}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
    if line.runs == "everything":
        monkeypatch.setenv("REQUANT_ENVIRONMENT", "the path of another environment")
    line.edit(place)
    assert place.planned(*line.options) == {rule: count for rule, count in line.jobs.items() if count}


def test_the_table_has_these_lines_and_no_others():
    assert dict(ROWS).keys() == {line.change for line in LINES} | ELSEWHERE.keys()
    assert {line.change: line.runs for line in LINES}.items() <= dict(ROWS).items()
    for file, test in ELSEWHERE.values():
        assert f"\ndef {test}(" in (Path(__file__).parent / file).read_text(encoding="utf-8")


def test_a_file_changed_by_hand_stops_the_build_and_is_named(place):
    """A shard in place, which is a block file too, and a tokenizer; a dry run warns, with the same line."""
    shard, block = "results/ds-w3a16/model/model-00002-of-00004.safetensors", "results/ds-w3a16/blocks/1.safetensors"
    manifest = json.loads(place.at("results/ds-w3a16/pack.json").read_text())["files"]
    place.flip(place.at(shard))
    done = place.build.run("model_card.md", "-n", check=False)
    line = next(line for line in done.stderr.splitlines() if line.startswith("warning: "))
    assert f"{shard}: changed by hand: sha256 " in line and manifest[Path(shard).name]["sha256"] in line
    assert f"one file with {block}" in line and line.endswith("or delete both, and the build makes them again")
    before = place.at(shard).read_bytes()
    done = place.build.run("model_card.md", check=False)
    assert done.returncode != 0 and line.replace("warning", "error") in done.stderr.splitlines()
    assert place.at(shard).read_bytes() == before


def test_a_card_changed_by_hand_is_named_where_there_are_sums(place):
    card = "results/ll-nvfp4/model/README.md"
    sums = place.save(place.at("results/ll-nvfp4/model/SHA256SUMS"))
    digest = "0" * 64
    sums.write_text(f"{digest}  README.md\n")
    done = place.build.run("model_card.md", "-n")
    assert "warning: " not in done.stderr, "as its job left it"
    place.change(place.at(card), b"requant", b"somebody")
    done = place.build.run("model_card.md", "-n")
    assert f"warning: {card}: changed by hand: sha256 " in done.stderr and digest in done.stderr

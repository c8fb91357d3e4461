"""provenance.json holds what a rebuild must reproduce, and nothing that a clock measured."""

import json
import platform
import subprocess
from importlib.metadata import distributions, version
from pathlib import Path
from typing import get_args

import jsonschema
import pytest
import yaml
from card_records import (
    BF16,
    NVFP4,
    PRUNED,
    change,
    load,
    make_copied,
    make_pruned_release,
    make_records,
    provenance_of,
    put,
    sha,
    statement_of,
)
from pydantic import BaseModel

from requant.config import Config, parse
from requant.environment import canonical, installed, machine
from requant.errors import RequantError
from requant.provenance import (
    SCHEMA,
    check_config,
    code_digests,
    dependencies,
    flake_inputs,
    git_commit,
    published_digests,
    read_provenance,
    task_digests,
    write_provenance,
)
from requant.provenance_schema import schema
from requant.records import KeepList, read_json
from requant.standalone import standalone
from requant.target_files import with_targets

ROOT = Path(__file__).resolve().parents[2]
DEFINITION = ("predicate", "buildDefinition")


@pytest.fixture
def root(tmp_path):
    make_records(tmp_path)
    return tmp_path


def keys(data) -> set[str]:
    if isinstance(data, dict):
        return set(data).union(*(keys(value) for value in data.values()))
    return set().union(*(keys(value) for value in data)) if isinstance(data, list) else set()


def test_provenance_says_what_the_records_say(root):
    found = provenance_of(load(root))
    assert (found.release, found.scheme, found.requant_commit) == (NVFP4, "NVFP4", "0123abc")
    assert found.source.revision == sha(("alpha", "revision")) and found.source.base_model == "some-org/alpha"
    assert found.source.files["model-00002-of-00003.safetensors"].sha256 == sha(("alpha", 2))
    assert found.calibration.calibration_sha256 == sha("calibration")
    assert found.calibration.heldout_sha256 == sha("heldout")
    assert found.calibration.calibration_texts == {"stories": sha("stories"), "exercises": sha("exercises")}
    assert found.calibration.heldout_texts == {"stories": sha("stories")}
    assert found.seeds == [1_000_003 + block for block in range(6)]
    assert found.files["model-00001-of-00001.safetensors"].sha256 == sha(NVFP4)
    (run,) = found.tuning
    assert run.blocks == [0, 1, 2, 3, 4, 5] and run.settings["iters"] == 200
    assert run.libraries == {"torch": "2.13.0", "transformers": "5.23.0"}


def test_a_pruned_models_provenance_has_its_experts_and_what_they_were_chosen_on(root):
    assert provenance_of(load(root)).pruning is None
    make_pruned_release(root)
    found = provenance_of(load(root, "alpha-25-nvfp4", **PRUNED))
    assert found.source.model == "alpha" and found.pruning.calibration_sha256 == sha("calibration")
    assert found.pruning.keep == read_json(root / "results/alpha-25/prune/keep.json", KeepList)
    assert found.pruning.keep.experts == 12


def test_slower_jobs_leave_the_provenance_as_it_is(root):
    before = provenance_of(load(root)).model_dump_json()
    for path in ("source/alpha/source", *(f"{NVFP4}/blocks/{block}" for block in range(6)), f"{NVFP4}/pack"):
        change(root, f"results/{path}.json", put("seconds", 12_345.6))
    for block in range(6):
        change(root, f"results/{NVFP4}/blocks/{block}.json", put("peak_memory_bytes", 1))
    assert provenance_of(load(root)).model_dump_json() == before


def test_no_clock_no_memory_no_local_path(root):
    path = root / "provenance.json"
    write_provenance(path, statement_of(load(root)))
    data = json.loads(path.read_text())
    assert not {"seconds", "peak_memory_bytes", "date", "time"} & keys(data)
    assert "/private/" not in path.read_text()
    assert read_provenance(path) == statement_of(load(root))


def test_the_statement_is_of_the_packed_files_and_names_what_they_were_made_from(root):
    found = statement_of(load(root), {"flake.lock": {"sha256": sha("flake")}})
    assert [(file.name, file.digest) for file in found.subject] == [
        ("model-00001-of-00001.safetensors", {"sha256": sha(NVFP4)})
    ]
    assert found.dependencies == {
        **{f"source/alpha/model-0000{i}-of-00003.safetensors": {"sha256": sha(("alpha", i))} for i in (1, 2, 3)},
        "text/default/stories": {"sha256": sha("stories")},
        "text/default/exercises": {"sha256": sha("exercises")},
        "requant": {"sha256": sha("code")},
        "flake.lock": {"sha256": sha("flake")},
    }
    blocks = {file.name: file.digest["sha256"] for file in found.predicate.runDetails.byproducts}
    assert blocks == {f"blocks/{block}.safetensors": sha((NVFP4, block)) for block in range(6)}
    assert found.request.release == NVFP4 and found.request.config["models"]["alpha"]["path"] == "alpha"


def test_texts_of_their_own_are_named_for_held_out_tokens(root):
    facts = load(root)
    config = {"calibrations": {"default": {"heldout": {"sources": [{"name": "stories"}]}}}}
    names = [found.name for found in dependencies(facts.source, [facts.calibration], config, {})]
    assert names[-3:] == ["text/default/stories", "text/default/exercises", "heldout/default/stories"]


@pytest.mark.parametrize(
    ("keys", "value", "line"),
    [
        (("_type",), "https://in-toto.io/Statement/v0.1", "_type: 'https://in-toto.io/Statement/v1' was expected"),
        (("subject",), [], r"subject: \[\] should be non-empty"),
        (("subject", 0, "name"), "/etc/passwd", "subject.0.name: '/etc/passwd' does not match"),
        (("subject", 0, "name"), "../model.safetensors", "subject.0.name: "),
        (("subject", 0, "digest", "sha256"), "A" * 64, "subject.0.digest.sha256: "),
        (("subject", 0, "digest", "sha256"), "0" * 64, "subject: other files or hashes than in internalParameters"),
        (("predicate", "extra"), 1, "predicate: Additional properties are not allowed"),
        ((*DEFINITION, "internalParameters", "seeds", 0), -1, r"seeds.0: -1 is less than"),
        ((*DEFINITION, "internalParameters", "machine", "host"), "n1", "machine: Additional properties"),
        ((*DEFINITION, "externalParameters", "release"), "other", "externalParameters: of another release"),
        ((*DEFINITION, "externalParameters", "config", "models", "alpha", "path"), "/x", "path: '/x'"),
        ((*DEFINITION, "resolvedDependencies"), [], "resolvedDependencies: "),
        (("predicate", "runDetails", "metadata", "startedOn"), "2026-01-01T00:00:00Z", "metadata: "),
        (("predicate", "runDetails", "builder", "version"), {"python": "3.11"}, "'requant' is a required property"),
        (("predicate", "runDetails", "byproducts", 0, "name"), "blocks/a", "byproducts.0.name: "),
    ],
)
def test_a_provenance_of_another_shape_is_refused_in_one_line(root, keys, value, line):
    path = root / "provenance.json"
    write_provenance(path, statement_of(load(root)))
    change(root, "provenance.json", put(*keys, value))
    with pytest.raises(RequantError, match=line) as caught:
        read_provenance(path)
    assert str(caught.value).startswith(f"{path}: ") and "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["", "{", "[" * 100_000, "[]", "null", '"text"'])
def test_what_is_no_provenance_is_refused_in_one_line(tmp_path, text):
    path = tmp_path / "provenance.json"
    with pytest.raises(RequantError, match="not there"):
        read_provenance(path)
    path.write_text(text)
    with pytest.raises(RequantError, match=r"provenance.json: .*; expected") as caught:
        read_provenance(path)
    assert "\n" not in str(caught.value)


def test_the_schema_is_a_schema_and_what_the_classes_say():
    jsonschema.Draft202012Validator.check_schema(json.loads(SCHEMA.read_text()))
    assert json.loads(SCHEMA.read_text()) == schema(), "run: python -m requant.provenance_schema"


def test_the_schema_knows_every_key_of_a_config():
    parts = schema()["$defs"]

    def held(section: type[BaseModel]) -> None:
        written = parts[section.__name__]["properties"]
        assert written.keys() == {field.alias or name for name, field in section.model_fields.items()}
        for field in section.model_fields.values():
            for inner in sections_in(field.annotation):
                held(inner)

    held(Config)
    assert parts["Config"]["properties"]["sandbox"] and not parts["Config"]["additionalProperties"]


def sections_in(annotation) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [inner for part in get_args(annotation) for inner in sections_in(part)]


@pytest.mark.parametrize(
    "path", [*sorted(ROOT.glob("config/*.yaml")), ROOT / "config.yaml"], ids=lambda path: path.stem
)
def test_every_release_of_the_presets_can_be_published(path):
    """Also with all that a release can have and no preset has."""
    config = parse(with_targets(yaml.safe_load(path.read_text()), ROOT / "config/targets"))
    for release in config.releases:
        check_config(release, standalone(config, release))
    with pytest.raises(RequantError, match="releases.x: its provenance.json would hold the whole: .*'nonsense'"):
        check_config("x", standalone(config, release) | {"nonsense": 1})


def test_a_config_that_names_a_place_of_the_machine_is_not_published():
    config = standalone(
        parse(with_targets(yaml.safe_load((ROOT / "config.yaml").read_text()), ROOT / "none")), "demo-nvfp4"
    )
    check_config("demo-nvfp4", config)
    config["benchmarks"]["demo"]["include_path"] = "/data/tasks"
    with pytest.raises(RequantError, match="benchmarks.demo.include_path: '/data/tasks' is not valid"):
        check_config("demo-nvfp4", config)


def test_a_pruned_and_a_copied_release_have_a_provenance_that_the_schema_takes(root):
    make_copied(root)
    make_pruned_release(root)
    write_provenance(root / "bf16.json", statement_of(load(root, BF16)))
    assert read_provenance(root / "bf16.json").provenance.tuning == []
    facts = load(root, "alpha-25-nvfp4", **PRUNED)
    write_provenance(root / "pruned.json", statement_of(facts))
    assert read_provenance(root / "pruned.json").provenance.pruning.keep == facts.pruning.keep


def test_files_of_tasks_are_named_by_their_place_and_not_by_the_machine(tmp_path):
    folder = tmp_path / "tasks"
    folder.mkdir()
    for name in ("a.yaml", "rows.jsonl"):
        (folder / name).write_text(name)
    (tmp_path / "data.jsonl").write_text("data")
    paths = [folder / "a.yaml", folder / "rows.jsonl", tmp_path / "data.jsonl"]
    digests = task_digests("tiny", str(folder), map(str, paths))
    assert digests == {
        "task/tiny/a.yaml": {"sha256": sha("a.yaml")},
        "task/tiny/rows.jsonl": {"sha256": sha("rows.jsonl")},
        "data/tiny/data.jsonl": {"sha256": sha("data")},
    }


def test_published_files_of_served_benchmarks_are_named_by_task(tmp_path):
    folders = {task: str(tmp_path / "far" / task) for task in ("gsm8k", "mmlu")}
    paths = [tmp_path / "far/gsm8k/test.jsonl", tmp_path / "far/mmlu/test/anatomy_test.csv"]
    for path in paths:
        path.parent.mkdir(parents=True)
        path.write_text(path.name)
    assert published_digests("public", folders, map(str, paths)) == {
        "served/public/gsm8k/test.jsonl": {"sha256": sha("test.jsonl")},
        "served/public/mmlu/test/anatomy_test.csv": {"sha256": sha("anatomy_test.csv")},
    }


def test_the_flakes_inputs_are_named_by_their_commits(tmp_path):
    assert flake_inputs(tmp_path / "flake.lock") == {}
    nodes = {"nixpkgs": {"locked": {"rev": "c" * 40, "narHash": "sha256-x"}}, "root": {"inputs": {}}}
    (tmp_path / "flake.lock").write_text(json.dumps({"nodes": nodes, "root": "root", "version": 7}))
    assert flake_inputs(tmp_path / "flake.lock") == {"flake/nixpkgs": {"gitCommit": "c" * 40}}


def test_the_code_is_named_by_its_hash_and_locks_by_theirs(tmp_path):
    for name in (
        "Snakefile",
        "rules/a.smk",
        "scripts/a.py",
        "src/requant/deep/a.py",
        "src/requant/t/a.j2",
        "envs/a.lock",
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    before = code_digests(tmp_path)
    assert before["envs/a.lock"] == {"sha256": sha("envs/a.lock")} and set(before["requant"]) == {"sha256"}
    (tmp_path / "notes.txt").write_text("not run")
    assert code_digests(tmp_path) == before
    for name in ("Snakefile", "rules/a.smk", "scripts/a.py", "src/requant/deep/a.py", "src/requant/t/a.j2"):
        (tmp_path / name).write_text("changed")
        assert code_digests(tmp_path) != before, name
        before = code_digests(tmp_path)


def test_versions_are_of_everything_installed():
    found = installed()
    assert found["pydantic"] == version("pydantic") and found["python"] == platform.python_version()
    assert found["huggingface-hub"] == version("huggingface_hub") and list(found) == sorted(found)
    names = {canonical(each.metadata["Name"]) for each in distributions()}
    assert names | {"python", "requant"} == set(found)


def test_the_kind_of_machine_names_no_machine():
    found = machine()
    assert found.system == platform.system() and found.architecture == platform.machine()
    assert platform.node() not in found.model_dump_json().split('"')


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("libraries", {"torch": "2.14.0"}),
        ("engine_version", "0.17.0"),
        ("threads", 2),
        ("device", "cuda:1"),
        ("settings", {"iters": 100}),
    ],
)
def test_blocks_made_differently_are_separate_runs(root, field, value):
    for block in (1, 2):
        change(root, f"results/{NVFP4}/blocks/{block}.json", put(field, value))
    runs = provenance_of(load(root)).tuning
    assert [run.blocks for run in runs] == [[0, 3, 4, 5], [1, 2]]
    assert getattr(runs[1], field) == value


def test_the_commit_is_that_of_the_checkout_and_changes_are_told(tmp_path, monkeypatch):
    def git(*arguments):
        command = ["git", "-C", str(tmp_path), "-c", "user.name=t", "-c", "user.email=t@t", *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    assert git_commit(tmp_path) is None
    monkeypatch.setenv("REQUANT_REVISION", "0123abc")
    assert git_commit(tmp_path) == "0123abc"
    git("init")
    (tmp_path / "file").write_text("one")
    git("add", "file")
    git("commit", "-m", "one")
    commit = git("rev-parse", "HEAD")
    assert git_commit(tmp_path) == commit
    (tmp_path / "file").write_text("two")
    assert git_commit(tmp_path) == f"{commit}-dirty"

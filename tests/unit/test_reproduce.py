"""What a rebuild checks before anything is built: the provenance, its inputs by their hashes, the versions."""

import hashlib
import json
from pathlib import Path

import pytest
from card_records import load, make_records, sha, statement_of

from requant import reproduce
from requant.config import SCHEMES, Reproduce, parse, reproduce_limits
from requant.errors import RequantError
from requant.main import main
from requant.provenance import write_provenance


def digest(text: str) -> dict[str, str]:
    return {"sha256": hashlib.sha256(text.encode()).hexdigest()}


def edited(root: Path, path: Path, change) -> Path:
    """The provenance of a release of hand-made records, after `change` has edited its config and dependencies."""
    make_records(root)
    write_provenance(path, statement_of(load(root)))
    data = json.loads(path.read_text())
    definition = data["predicate"]["buildDefinition"]
    dependencies = {each["name"]: each["digest"] for each in definition["resolvedDependencies"]}
    change(definition["externalParameters"]["config"], dependencies)
    definition["resolvedDependencies"] = [{"name": name, "digest": found} for name, found in dependencies.items()]
    path.write_text(json.dumps(data))
    return path


def own_text(config, dependencies) -> None:
    """The release is made of a model of two files, a text, a folder of tasks and a file that a task names."""
    for name in dependencies.keys() - {"requant"}:
        del dependencies[name]
    config["models"]["alpha"]["path"] = "models/alpha"
    texts = [{"path": "text/a.txt", "name": "a"}]
    config["calibrations"]["default"] |= {"sources": texts, "heldout": {"nsamples": 2, "sources": None}}
    config["benchmarks"]["default"]["include_path"] = "tasks"
    made = {"source/alpha/config.json": "c", "source/alpha/model.safetensors": "w", "text/default/a": "t"}
    made |= {"task/default/x.yaml": "y", "data/default/rows/x.jsonl": "r"}
    dependencies.update({name: digest(text) for name, text in made.items()})


def write_inputs(folder: Path) -> None:
    files = {"models/alpha/config.json": "c", "models/alpha/model.safetensors": "w", "text/a.txt": "t"}
    for name, text in (files | {"tasks/x.yaml": "y", "rows/x.jsonl": "r", "models/alpha/private": "p"}).items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)


@pytest.fixture
def commands(monkeypatch) -> list:
    """The Snakemake commands that would run; none does."""
    seen: list = []

    def note(into, root, cores, target, *options):
        seen.append((into, cores, target, *options))
        raise reproduce.BuildFailed("not built")

    monkeypatch.setattr(reproduce, "_snakemake", note)
    return seen


def run(provenance: Path, into: Path, *words: str) -> int:
    return main(["reproduce", str(provenance), "--into", str(into), "--cores", "3", *words])


def test_inputs_are_found_checked_and_linked_where_the_config_looks_for_them(tmp_path, commands, monkeypatch):
    write_inputs(tmp_path / "here")
    (tmp_path / "alone").mkdir()
    path = edited(tmp_path / "records", tmp_path / "alone/provenance.json", own_text)
    monkeypatch.chdir(tmp_path / "here")
    into = tmp_path / "new"
    assert run(path, into) == 1, "the build that does not run has failed"
    assert commands == [(into, "3", "results/alpha-nvfp4/pack.json")], "of a provenance alone: the checkpoint"
    assert (into / "models/alpha/model.safetensors").resolve() == tmp_path / "here/models/alpha/model.safetensors"
    assert (into / "rows/x.jsonl").read_text() == "r" and (into / "tasks/x.yaml").is_symlink()
    assert not (into / "models/alpha/private").exists(), "only what the provenance names"
    assert (run(path, into), len(commands)) == (1, 2), "the same command goes on"
    (into / "reproduce.yaml").write_text("other: 1\n")
    assert run(path, into) == 2 and len(commands) == 2, "another directory's contents are left alone"


def test_given_inputs_are_linked_under_the_configs_names(tmp_path, commands, monkeypatch):
    write_inputs(tmp_path / "far")
    (tmp_path / "alone").mkdir()
    path = edited(tmp_path / "records", tmp_path / "alone/provenance.json", own_text)
    monkeypatch.chdir(tmp_path)
    far = tmp_path / "far"
    given = [f"alpha={far}/models/alpha", f"text/default/a={far}/text/a.txt", f"task/default={far}/tasks"]
    assert run(path, tmp_path / "new", "--inputs", *given, f"x.jsonl={far}/rows/x.jsonl") == 1
    assert (tmp_path / "new/text/a.txt").resolve() == far / "text/a.txt"


def test_published_files_of_a_served_benchmark_are_an_input(tmp_path, commands, monkeypatch, capsys):
    def served(config, dependencies) -> None:
        own_text(config, dependencies)
        config["benchmarks"]["default"]["served"] = {"gsm8k": {"data": "gsm8k"}}
        dependencies["served/default/gsm8k/test.jsonl"] = digest("g")

    write_inputs(tmp_path / "here")
    (tmp_path / "alone").mkdir()
    path = edited(tmp_path / "records", tmp_path / "alone/provenance.json", served)
    monkeypatch.chdir(tmp_path / "here")
    assert run(path, tmp_path / "new") == 2
    assert "gsm8k: not there; expected --inputs served/default/gsm8k=PATH" in capsys.readouterr().err
    (tmp_path / "far").mkdir()
    (tmp_path / "far/test.jsonl").write_text("g")
    assert run(path, tmp_path / "new", "--inputs", f"gsm8k={tmp_path}/far") == 1
    assert (tmp_path / "new/gsm8k/test.jsonl").resolve() == tmp_path / "far/test.jsonl"
    assert "served/default/gsm8k" not in capsys.readouterr().err, "an input is no version that differs"


def climbing(config, dependencies) -> None:
    own_text(config, dependencies)
    config["calibrations"]["default"]["sources"][0]["path"] = "results/../../../text/a.txt"


def climbing_file(config, dependencies) -> None:
    own_text(config, dependencies)
    dependencies["source/alpha/../../x"] = digest("x")


def wrong_value(config, dependencies) -> None:
    config["releases"]["alpha-nvfp4"]["tuning"]["iters"] = -1


def test_a_path_that_leads_out_is_given_and_becomes_one_inside(tmp_path, commands, monkeypatch, capsys):
    write_inputs(tmp_path / "here")
    (tmp_path / "alone").mkdir()
    path = edited(tmp_path / "records", tmp_path / "alone/provenance.json", climbing)
    monkeypatch.chdir(tmp_path / "here")
    assert run(path, tmp_path / "new") == 2
    assert "results/../../../text/a.txt: not there; expected --inputs text/default/a=PATH" in capsys.readouterr().err
    assert run(path, tmp_path / "new", "--inputs", "a=text/a.txt") == 1
    assert (tmp_path / "new/inputs/text/default/a").read_text() == "t"
    assert "path: inputs/text/default/a" in (tmp_path / "new/reproduce.yaml").read_text()


@pytest.mark.parametrize(
    ("change", "spoil", "words", "message"),
    [
        (wrong_value, None, [], "provenance.json: config: releases.alpha-nvfp4.tuning.iters: -1; expected: "),
        (climbing_file, None, [], "source/alpha/../../x: expected a path inside source/alpha"),
        (own_text, "text/a.txt", [], "text/a.txt: sha256 "),
        (own_text, "models/alpha/model.safetensors", [], "model.safetensors: sha256 "),
        (own_text, None, ["--inputs", "beta=x"], "--inputs beta: found 0 inputs of that name; expected one of source/"),
        (own_text, None, ["--inputs", "alpha=nowhere"], "nowhere/config.json: not there; source/alpha was made with"),
        (own_text, None, ["--strict"], "versions differ, the first is "),
    ],
)
def test_what_is_wrong_is_one_line_and_nothing_is_made(
    tmp_path, commands, monkeypatch, capsys, change, spoil, words, message
):
    write_inputs(tmp_path / "here")
    (tmp_path / "alone").mkdir()
    path = edited(tmp_path / "records", tmp_path / "alone/provenance.json", change)
    if spoil:
        (tmp_path / "here" / spoil).write_text("other")
    monkeypatch.chdir(tmp_path / "here")
    assert run(path, tmp_path / "new", *words) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("warning: ")]
    assert len(errors) == 1 and message in errors[0]
    assert not commands and not (tmp_path / "new").exists()


def test_every_version_that_is_another_is_named(tmp_path, commands, monkeypatch, capsys):
    write_inputs(tmp_path / "here")
    (tmp_path / "alone").mkdir()
    path = edited(tmp_path / "records", tmp_path / "alone/provenance.json", own_text)
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setattr(reproduce, "installed", lambda: {"python": "3.11.2", "requant": "0.1.0", "torch": "2.14.0"})
    monkeypatch.setattr(reproduce, "code_digests", lambda root: {"requant": {"sha256": sha("other code")}})
    run(path, tmp_path / "new")
    lines = capsys.readouterr().err
    assert "warning: torch: 2.14.0 here; the release was made with 2.13.0" in lines
    assert f"warning: requant's code: {sha('other code')} here" in lines and "warning: python" not in lines


def test_a_file_that_is_not_the_provenances_is_told_before_anything_is_built(tmp_path, commands, monkeypatch, capsys):
    (tmp_path / "release").mkdir()
    path = edited(tmp_path / "records", tmp_path / "release/provenance.json", own_text)
    write_inputs(tmp_path / "here")
    monkeypatch.chdir(tmp_path / "here")
    name = json.loads(path.read_text())["subject"][0]["name"]
    (tmp_path / "release" / name).write_text("{}")
    assert run(path, tmp_path / "new") == 2
    assert f"release/{name}: sha256 " in capsys.readouterr().err and not commands


def test_limits_that_are_absent_are_those_of_the_scheme():
    assert reproduce_limits(Reproduce(), "NVFP4").min_cosine == 0.985
    assert reproduce_limits(Reproduce(), "NVFP4").max_relative_error == pytest.approx((2 * 0.015) ** 0.5)
    assert reproduce_limits(Reproduce(max_code_fraction=0.1), "W3A16").max_code_fraction == 0.1
    exact = Reproduce(min_cosine=1, max_code_fraction=0, max_relative_error=0)
    assert reproduce_limits(Reproduce(), "BF16") == exact
    for scheme in SCHEMES:
        assert None not in reproduce_limits(Reproduce(), scheme).model_dump().values()


def test_a_limit_out_of_range_is_one_line():
    data = {"models": {"a": {"path": "x"}}, "releases": {"r": {"model": "a", "scheme": "NVFP4"}}, "build": ["r"]}
    data["releases"]["r"]["reproduce"] = {"min_cosine": 1.5}
    with pytest.raises(RequantError, match=r"^config: releases.r.reproduce.min_cosine: 1.5; expected"):
        parse(data)

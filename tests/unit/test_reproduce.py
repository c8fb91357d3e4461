"""What a rebuild checks before anything is built: the provenance, its inputs by their hashes, the versions."""

import hashlib
import json
import subprocess
from pathlib import Path

import pytest
import yaml
from card_records import load, make_records, sha, statement_of

from requant import provenance, reproduce
from requant.config import SCHEMES, Reproduce, Sandbox, Target, parse, reproduce_limits
from requant.errors import RequantError
from requant.foreign import check_task_files
from requant.hashing import file_entry
from requant.main import main
from requant.provenance import write_provenance
from requant.target_files import FOLDER, target_named

ROOT = Path(__file__).resolve().parents[2]
DONE = subprocess.CompletedProcess([], 0)


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


# What a stranger chose


def whole(tmp_path: Path, change) -> Path:
    """A published folder with a card, whose provenance `change` has edited: to be rebuilt with its measurements."""
    folder = tmp_path / "release"
    folder.mkdir()
    (folder / "README.md").write_text("a card")
    (folder / "config.json").write_text("{}")
    path = edited(tmp_path / "records", folder / "provenance.json", change)
    data = json.loads(path.read_text())
    of_file = digest("{}")
    data["subject"] = [{"name": "config.json", "digest": of_file}]
    files = {"config.json": {"size": 2, **of_file}}
    data["predicate"]["buildDefinition"]["internalParameters"]["files"] = files
    path.write_text(json.dumps(data))
    return folder


PLAIN_TASK = """\
task: x
dataset_path: json
dataset_kwargs: {data_files: {test: rows/x.jsonl}}
test_split: test
doc_to_text: "{{question}}"
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
"""


def plain_task(config, dependencies, text: str = PLAIN_TASK) -> None:
    """`own_text`, its task of data and templates alone."""
    own_text(config, dependencies)
    dependencies["task/default/x.yaml"] = digest(text)


def at_target(**keys):
    """An edit: the release is served at a target of these keys, called evil."""

    def change(config, dependencies) -> None:
        plain_task(config, dependencies)
        config["releases"]["alpha-nvfp4"]["deploy"]["target"] = "evil"
        config["targets"] = {"evil": keys}

    return change


@pytest.fixture
def inputs(tmp_path, monkeypatch) -> Path:
    """This directory, with what `plain_task` names."""
    write_inputs(tmp_path / "here")
    (tmp_path / "here/tasks/x.yaml").write_text(PLAIN_TASK)
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "here"


def refusals(capsys) -> list[str]:
    return [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]


def built(into: Path) -> dict:
    return yaml.safe_load((into / "reproduce.yaml").read_text())


EVIL = [
    ({"image": "evil/x:1"}, "image: evil/x:1"),
    ({"image": "requant-engine:cpu", "container": {"network": "host", "pull": "missing"}}, "container.network: host"),
    ({"container": {"mounts": [{"source": "mine", "target": "/host", "read_only": False}]}}, "mounts: mine:/host"),
    ({"container": {"capabilities": ["SYS_ADMIN"]}}, "container.capabilities: SYS_ADMIN"),
    ({"container": {"user": "0:0"}}, "container.user: 0:0"),
    ({"container": {"ipc": "host"}}, "container.ipc: host"),
    ({"arguments": ["--trust-remote-code"]}, "arguments: --trust-remote-code"),
    ({"arguments": ["--log-level", "debug"]}, "arguments: --log-level debug"),
    ({"environment": {"PATH": "/tmp/evil"}}, "environment.PATH: /tmp/evil"),
    ({"environment": {"LD_PRELOAD": "/tmp/x.so"}}, "environment.LD_PRELOAD: /tmp/x.so"),
    ({"environment": {f"A{n}": "1" for n in range(40)}, "image": "evil/x"}, "image: evil/x, environment.A0: 1"),
    ({"image": "evil\x1b[2K/x"}, "image: evil?[2K/x"),
]


@pytest.mark.parametrize(("keys", "shown"), EVIL)
def test_a_published_target_that_is_none_of_ones_own_is_shown_and_not_run(
    keys, shown, inputs, tmp_path, commands, capsys
):
    folder = whole(tmp_path, at_target(**keys))
    assert run(folder, tmp_path / "new") == 2
    (line,) = refusals(capsys)
    assert "its target evil is none of yours, and nothing of it is run: " in line and shown in line
    assert "expected --target NAME, one of cpu-docker, cpu-transformers, " in line and "--weights-only" in line
    assert not commands and not (tmp_path / "new").exists()
    assert run(folder, tmp_path / "new", "--weights-only") == 1, "nothing is served"
    assert commands[0][2] == "results/alpha-nvfp4/pack.json"
    assert built(tmp_path / "new")["targets"] == {"cpu-transformers": Target().model_dump(mode="json")}
    assert run(folder, tmp_path / "named", "--target", "cpu-docker") == 1
    own = target_named("cpu-docker", None, ROOT / FOLDER).model_dump(mode="json")
    assert built(tmp_path / "named")["targets"] == {"cpu-docker": own}
    assert built(tmp_path / "named")["releases"]["alpha-nvfp4"]["deploy"]["target"] == "cpu-docker"
    assert commands[1][2] == "results/alpha-nvfp4/model/SHA256SUMS"


@pytest.mark.parametrize(
    ("keys", "line"),
    [
        ({"container": {"mounts": [{"source": "/", "target": "/host"}]}}, "mounts.0.source: '/' does not match"),
        ({"privileged": True}, "config: targets.evil.privileged: unknown key"),
    ],
)
def test_a_target_that_no_provenance_has_is_refused_whatever_is_asked_for(
    keys, line, inputs, tmp_path, commands, capsys
):
    folder = whole(tmp_path, at_target(**keys))
    for arguments in ((), ("--weights-only",), ("--target", "cpu-docker")):
        assert run(folder, tmp_path / "new", *arguments) == 2
        assert line in refusals(capsys)[-1]
        assert not commands and not (tmp_path / "new").exists()


def test_a_published_target_is_taken_if_ones_own_is_the_same(inputs, tmp_path, commands, capsys):
    """By what is executed, whatever it is called and said to be."""
    own = target_named("sm90-vllm", None, ROOT / FOLDER).model_dump(mode="json")
    folder = whole(tmp_path, at_target(**own | {"description": "another", "tested": "never"}))
    assert run(folder, tmp_path / "new") == 1
    assert built(tmp_path / "new")["targets"] == {"sm90-vllm": own}
    config = tmp_path / "mine.yaml"
    config.write_text("targets: {mine: {like: sm90-vllm, devices: 2}}\n")
    (tmp_path / "other").mkdir()
    folder = whole(tmp_path / "other", at_target(**own | {"devices": 2}))
    assert run(folder, tmp_path / "none") == 2 and "devices: 2" in refusals(capsys)[-1]
    assert run(folder, tmp_path / "mine", "--configfile", str(config)) == 1
    assert list(built(tmp_path / "mine")["targets"]) == ["mine"]
    assert run(folder, tmp_path / "mine", "--target", "nothing") == 2
    assert refusals(capsys)[-1].startswith("error: --target nothing: no such target; expected one of cpu-docker, ")


def test_code_of_a_model_runs_in_ones_own_sandbox_alone(inputs, tmp_path, commands, monkeypatch):
    """Its limits, which scores depend on, are the published ones. (The shipped schema, which knows no `sandbox` yet for
    each release, is not asked.)"""

    def change(config, dependencies) -> None:
        plain_task(config, dependencies)
        config["sandbox"] = {"image": "evil/python", "backend": "docker", "seconds": 3.5, "memory_mb": 512}
        config["publish"] = {"signing_key": "../../key.pem", "repositories": {"alpha-nvfp4": "evil/x"}}

    monkeypatch.setattr(provenance, "_check", lambda path, data: None)
    path = edited(tmp_path / "records", tmp_path / "provenance.json", change)
    assert run(path, tmp_path / "new") == 1
    own = Sandbox(seconds=3.5, memory_mb=512).model_dump(mode="json")
    assert built(tmp_path / "new")["sandbox"] == own and "publish" not in built(tmp_path / "new")
    (tmp_path / "mine.yaml").write_text("sandbox: {image: 'python:3.11-slim', processes: 2}\n")
    assert run(path, tmp_path / "mine", "--configfile", str(tmp_path / "mine.yaml")) == 1
    assert built(tmp_path / "mine")["sandbox"] == own | {"image": "python:3.11-slim", "processes": 2}


CODE = {
    "a function": ({"x.yaml": PLAIN_TASK + "process_docs: !function os.system\n"}, "!function names a function"),
    "another tag": ({"x.yaml": "a: !!python/object/apply:os.system [id]\n"}, "no YAML: could not determine a"),
    "a module": ({"x.yaml": PLAIN_TASK, "utils.py": ""}, "utils.py: code, or no data"),
    "a library": ({"x.yaml": PLAIN_TASK, "x.so": ""}, "x.so: code, or no data"),
    "a class": ({"x.yaml": "task: x\nclass: os.system\n"}, "`class` takes code"),
    "unsafe code": ({"x.yaml": PLAIN_TASK + "unsafe_code: true\n"}, "`unsafe_code` takes code"),
    "a metric of another": ({"x.yaml": "metric_list: [{metric: exact_match/evil}]\n"}, "metric: 'exact_match/evil'"),
    "a metric in a list": ({"x.yaml": "metric_list: [{metric: [acc]}]\n"}, "metric: ['acc']: not one of lm-eval's own"),
    "hub metrics": ({"x.yaml": "metric_list: [{metric: acc, hf_evaluate: true}]\n"}, "`hf_evaluate` takes code"),
    "a data set": ({"x.yaml": "dataset_path: evil/set\n"}, "dataset_path: 'evil/set': not of json, csv"),
    "a cache": ({"x.yaml": "dataset_kwargs: {cache_dir: ../../x}\n"}, "dataset_kwargs: 'cache_dir': not of data_files"),
    "files above": ({"x.yaml": "dataset_kwargs: {data_files: ../x.jsonl}\n"}, "data_files: '../x.jsonl': not in"),
    "files anywhere": ({"x.yaml": "dataset_kwargs: {data_files: {t: [/etc/passwd]}}\n"}, "data_files: '/etc/passwd'"),
    "files by net": ({"x.yaml": "dataset_kwargs: {data_files: 'http://x/y'}\n"}, "data_files: 'http://x/y': not in"),
    "an include": ({"x.yaml": "include: ../../y.yaml\n"}, "include: '../../y.yaml': not among the tasks"),
    "an include of data": ({"x.yaml": "include: y.txt\n", "y.txt": "a: !function b.c\n"}, "include: 'y.txt': not"),
    "deep inside": ({"d/x.yaml": "task: [{task: y, fewshot_config: {process_docs: f}}]\n"}, "`process_docs` takes"),
    "no YAML": ({"x.yaml": "a: ["}, "no YAML"),
    "an alias of itself": ({"x.yaml": "a: &a [*a]\nb: *a\nclass: c\n"}, "`class` takes code"),
}  # fmt: skip


@pytest.mark.parametrize("kind", CODE)
def test_published_tasks_that_could_run_code_are_refused(kind, inputs, tmp_path, commands, capsys):
    """The right files by their hashes: the publisher chose both."""
    files, said = CODE[kind]

    def change(config, dependencies) -> None:
        plain_task(config, dependencies)
        del dependencies["task/default/x.yaml"]
        dependencies.update({f"task/default/{name}": digest(text) for name, text in files.items()})

    for name, text in files.items():
        (inputs / "tasks" / name).parent.mkdir(exist_ok=True)
        (inputs / "tasks" / name).write_text(text)
    folder = whole(tmp_path, change)
    assert run(folder, tmp_path / "new") == 2
    (line,) = refusals(capsys)
    assert line.startswith(f"error: {inputs}/tasks/") and said in line
    assert not commands and not (tmp_path / "new").exists()
    assert run(folder, tmp_path / "new", "--weights-only") == 1, "no task is run"


@pytest.mark.parametrize("name", ["https://evil/x.json", "data/**", "d/*.json", "./x.json", "{a,b}.json", "s3:/x"])
def test_data_of_a_task_is_one_file_of_that_name(name, tmp_path):
    """Though a dependency is called so: lm-eval would take an address, or a pattern, for what it is."""
    (tmp_path / "x.yaml").write_text(yaml.safe_dump({"task": "x", "dataset_kwargs": {"data_files": name}}))
    with pytest.raises(RequantError, match="x.yaml: .*data_files: "):
        check_task_files(tmp_path, ["x.yaml"], [name])
    (tmp_path / "x.yaml").write_text(yaml.safe_dump({"task": "x", "dataset_kwargs": {"data_files": "d/x.json"}}))
    check_task_files(tmp_path, ["x.yaml"], ["d/x.json"])


def test_rows_among_the_tasks_are_their_data(inputs, tmp_path, commands):
    task = PLAIN_TASK.replace("rows/x.jsonl", "tasks/x.jsonl")
    (inputs / "tasks/x.yaml").write_text(task)
    (inputs / "tasks/x.jsonl").write_text("r")

    def change(config, dependencies) -> None:
        plain_task(config, dependencies, task)
        dependencies["task/default/x.jsonl"] = digest("r")

    assert run(whole(tmp_path, change), tmp_path / "new") == 1
    assert (tmp_path / "new/tasks/x.jsonl").read_text() == "r"


def test_tasks_of_the_checkout_are_ones_own_whatever_they_hold(inputs, tmp_path, commands):
    """The demo's have functions; a publisher of the demo names them by their hashes."""
    names = {f"task/default/{path.name}": path for path in (ROOT / "demo/tasks").iterdir() if path.is_file()}

    def change(config, dependencies) -> None:
        own_text(config, dependencies)
        del dependencies["task/default/x.yaml"], dependencies["data/default/rows/x.jsonl"]
        config["benchmarks"]["default"]["include_path"] = "demo/tasks"
        dependencies.update({name: {"sha256": file_entry(path).sha256} for name, path in names.items()})

    assert (ROOT / "demo/tasks/scoring.py").exists()
    assert run(whole(tmp_path, change), tmp_path / "new") == 1
    assert not (tmp_path / "new/demo").exists() and not (tmp_path / "new/inputs").exists(), (
        "they are left where they are"
    )


def test_a_place_that_a_program_would_take_for_its_own_becomes_another(tmp_path, commands, monkeypatch):
    """Profiles of Snakemake, modules of Python, what the checkout's paths mean: nothing of a stranger's lies there."""
    places = ["profiles/default", "default", "locks", ".snakemake/scripts", "inputs", "demo/tasks", "numpy"]
    for number, place in enumerate(places):

        def change(config, dependencies, place=place) -> None:
            own_text(config, dependencies)
            config["models"]["alpha"]["path"] = place
            dependencies["source/alpha/config.yaml"] = digest("executor: evil")

        here = tmp_path / f"here{number}"
        write_inputs(here)
        (here / "models/alpha/config.yaml").write_text("executor: evil")
        monkeypatch.chdir(here)
        path = edited(tmp_path / f"records{number}", here / "provenance.json", change)
        given = ["--inputs", "alpha=models/alpha", "task/default=tasks"]
        assert run(path, tmp_path / f"new{number}", *given) == 1, place
        assert built(tmp_path / f"new{number}")["models"]["alpha"]["path"] == "inputs/source/alpha"
        assert not (tmp_path / f"new{number}" / place / "config.yaml").exists() or place == "inputs"


def odd_text(path: str, name: str = "a"):
    def change(config, dependencies) -> None:
        plain_task(config, dependencies)
        del dependencies["text/default/a"]
        config["calibrations"]["default"]["sources"] = [{"path": path, "name": name}]
        dependencies[f"text/default/{name}"] = digest("t")

    return change


@pytest.mark.parametrize(
    "path",
    [
        "demo/generate.py",
        "torch.py",
        "matplotlibrc",
        "reproduce.yaml",
        "Snakefile",
        ".netrc",
        "text/../x",
        "a/b.smk",
    ],
)
def test_a_text_lies_where_no_program_looks_for_anything_else(path, inputs, tmp_path, commands):
    path = edited(tmp_path / "records", tmp_path / "provenance.json", odd_text(path))
    assert run(path, tmp_path / "new", "--inputs", f"a={inputs}/text/a.txt") == 1
    (source,) = built(tmp_path / "new")["calibrations"]["default"]["sources"]
    assert source["path"] == "inputs/text/default/a" and (tmp_path / "new" / source["path"]).read_text() == "t"


def test_no_input_lies_in_the_folder_of_another(inputs, tmp_path, commands):
    """A text among the tasks would be one of them."""
    path = edited(tmp_path / "records", tmp_path / "provenance.json", odd_text("tasks/y.txt"))
    assert run(path, tmp_path / "new", "--inputs", f"a={inputs}/text/a.txt") == 1
    assert [found.name for found in (tmp_path / "new/inputs/task/default").iterdir()] == ["x.yaml"]
    assert (tmp_path / "new/inputs/text/default/a").read_text() == "t" and not (tmp_path / "new/tasks").exists()


def of_bucket(config, dependencies) -> None:
    plain_task(config, dependencies)
    config["models"]["alpha"] = {"bucket": "s3://evil/x"}


def downloads_above(config, dependencies) -> None:
    plain_task(config, dependencies)
    config["models"]["alpha"] = {"hub": "org/name", "revision": "0" * 40, "directory": "../../.ssh"}


def without_hash(*keys, value: str):
    def change(config, dependencies) -> None:
        plain_task(config, dependencies)
        *inner, last = keys
        section = config
        for key in inner:
            section = section[key]
        section[last] = value
        for name in [name for name in dependencies if name.startswith(("task/", "source/", "text/"))]:
            if name.split("/")[0] == {"models": "source", "calibrations": "text", "benchmarks": "task"}[keys[0]]:
                del dependencies[name]

    return change


def module_for_data(config, dependencies) -> None:
    plain_task(config, dependencies)
    dependencies["data/default/rouge/rouge.py"] = digest("r")


OF_TASKS, OF_TEXT = ("benchmarks", "default", "include_path"), ("calibrations", "default", "sources", 0, "path")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            odd_text("x.txt", "../../../../home/evil"),
            "resolvedDependencies: text/default/../../../../home/evil: expected",
        ),
        (
            odd_text("x.txt", "a\u202eb"),
            "resolvedDependencies: text/default/a?b: expected a name that leads nowhere else",
        ),
        (of_bucket, "models.alpha.bucket: s3://evil/x; expected `path`"),
        (downloads_above, "models.alpha.directory: ../../.ssh; expected one in the new directory"),
        (without_hash(*OF_TASKS, value="../evil"), "include_path: ../evil: resolvedDependencies has no hash of it"),
        (without_hash(*OF_TASKS, value="demo"), "include_path: demo: resolvedDependencies has no hash of it"),
        (without_hash(*OF_TEXT, value="../../x"), "sources.0.path: ../../x: resolvedDependencies has no hash of it"),
        (
            without_hash(*OF_TEXT, value="results/../../x"),
            "sources.0.path: results/../../x: resolvedDependencies has no",
        ),
        (without_hash("models", "alpha", "path", value="~/x"), "models.alpha.path: '~/x' is not"),
        (
            without_hash("models", "alpha", "path", value="x/../../y"),
            "models.alpha.path: x/../../y: resolvedDependencies",
        ),
        (module_for_data, "resolvedDependencies: data/default/rouge/rouge.py: expected a file of data that no program"),
    ],
)
def test_what_leads_out_or_has_no_hash_is_one_line_and_nothing_is_made(
    change, message, inputs, tmp_path, commands, capsys
):
    (inputs / "rouge").mkdir()
    (inputs / "rouge/rouge.py").write_text("r")
    path = edited(tmp_path / "records", tmp_path / "provenance.json", change)
    given = ["--inputs", f"a={inputs}/text/a.txt"] if "text/default/" in message else []
    assert run(path, tmp_path / "new", *given) == 2
    (line,) = refusals(capsys)
    assert message in line
    assert not commands and not (tmp_path / "new").exists()


def test_a_subject_is_a_file_of_the_release(inputs, tmp_path, commands, capsys):
    folder = whole(tmp_path, plain_task)
    data = json.loads((folder / "provenance.json").read_text())
    data["subject"][0]["name"] = "../../x"
    files = data["predicate"]["buildDefinition"]["internalParameters"]["files"]
    files["../../x"] = files.pop("config.json")
    (folder / "provenance.json").write_text(json.dumps(data))
    assert run(folder, tmp_path / "new") == 2
    (line,) = refusals(capsys)
    assert "subject" in line and "../../x" in line and not commands


def test_the_build_looks_for_modules_and_profiles_in_the_checkout_alone(tmp_path, monkeypatch):
    """A stand-in for the build notes what it would be started with; the directory has traps."""
    (tmp_path / "yaml.py").write_text("raise SystemExit('trapped')\n")
    (tmp_path / "profiles/default").mkdir(parents=True)
    (tmp_path / "profiles/default/config.yaml").write_text("executor: trapped\n")
    started = []
    real = reproduce.subprocess.run
    monkeypatch.setattr(reproduce.subprocess, "run", lambda command, **keys: started.append((command, keys)) or DONE)
    reproduce._snakemake(tmp_path, ROOT, "1", "x")
    monkeypatch.setattr(reproduce.subprocess, "run", real)
    ((command, keys),) = started
    assert command[command.index("--workflow-profile") + 1] == str(ROOT / "profiles/default")
    script = "import yaml, sys; print(yaml.__file__)"
    done = real([*command[:2], "-c", script], capture_output=True, text=True, cwd=tmp_path, env=keys["env"])
    assert done.returncode == 0 and str(tmp_path) not in done.stdout
    job = real([command[0], "-c", script], capture_output=True, text=True, cwd=tmp_path, env=keys["env"])
    assert job.returncode == 0 and str(tmp_path) not in job.stdout, "nor do the jobs"


def test_what_a_stranger_wrote_is_printed_without_control_characters(inputs, tmp_path, commands, capsys):
    path = edited(tmp_path / "records", tmp_path / "provenance.json", plain_task)
    data = json.loads(path.read_text())
    data["predicate"]["runDetails"]["builder"]["version"]["torch"] = "1\x1b[2J\nerror: x"
    path.write_text(json.dumps(data))
    run(path, tmp_path / "new")
    said = capsys.readouterr().err
    assert "\x1b" not in said and "the release was made with 1?[2J error: x" in said


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

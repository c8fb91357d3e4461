"""The house itself: locks, profile, Makefile, rules and scripts. Nothing here runs a build."""

import ast
import re
import shutil
import subprocess
import sys
from importlib.metadata import distributions
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]
ENVS = ROOT / "envs"
LOCKS = ("build", "requirements", "torch-cpu", "torch-cuda", "test")
MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")


def canonical(name: str) -> str:
    """A package's name as the packaging standard compares names."""
    return re.sub(r"[-_.]+", "-", name).lower()


def pins_in(text: str) -> dict[str, str]:
    """{package: version} of the pins of a .in file or a lock; without extras and build tags (+cpu)."""
    pins = re.findall(r"^([\w.-]+)(?:\[[\w,]+\])?==([\w.]+)(?:\+\w+)?\s*(?:\\|#.*)?$", text, re.MULTILINE)
    return {canonical(name): version for name, version in pins}


def lock(name: str) -> str:
    return (ENVS / f"{name}.lock").read_text(encoding="utf-8")


def tracked_files() -> list[Path]:
    """Files that git tracks or would track; without git, the test that asks is skipped."""
    if shutil.which("git") is None or not (ROOT / ".git").exists():
        pytest.skip("needs git and a checkout (Debian: git)")
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    listed = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    return [ROOT / name for name in listed.split("\0") if name and (ROOT / name).is_file()]


@pytest.mark.parametrize("name", LOCKS)
def test_every_lock_entry_has_an_exact_version_and_a_hash(name):
    entries = re.split(r"^(?=\S)", lock(name), flags=re.MULTILINE)
    entries = [entry for entry in entries if entry.strip() and not entry.startswith("#")]
    assert entries
    for entry in entries:
        assert re.fullmatch(r"[\w.-]+==[\w.+]+( \\\n    --hash=sha256:[0-9a-f]{64})+\n", entry), entry[:80]


@pytest.mark.parametrize(
    ("source", "locks"),
    [
        ("build", ["build"]),
        ("requirements", ["requirements", "torch-cuda"]),
        ("cluster", ["cluster"]),
        ("test", ["test"]),
    ],
)
def test_locks_hold_the_pins_of_their_sources(source, locks):
    text = (ENVS / f"{source}.in").read_text(encoding="utf-8")
    wanted = pins_in(text)
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    assert len(wanted) == len(lines), f"envs/{source}.in: each line is one exact pin"
    locked = {package: version for name in locks for package, version in pins_in(lock(name)).items()}
    assert {package: locked.get(package) for package in wanted} == wanted


def test_locks_agree_with_each_other_and_with_the_conda_environment():
    assert pins_in(lock("torch-cpu")) == {"torch": pins_in(lock("torch-cuda"))["torch"]}
    common = pins_in(lock("requirements"))
    assert common["setuptools"] == pins_in(lock("build"))["setuptools"]
    others = [pins_in(lock(name)) for name in ("torch-cuda", "cluster", "test")]
    assert not any(common.keys() & other.keys() for other in others)
    conda = yaml.safe_load((ENVS / "requant.yaml").read_text(encoding="utf-8"))
    by_pip = next(entry["pip"] for entry in conda["dependencies"] if isinstance(entry, dict))
    assert pins_in("\n".join(by_pip)) == common | pins_in(lock("torch-cpu"))


def test_environment_holds_the_locked_versions():
    if Path(sys.prefix).resolve() != (ROOT / ".venv").resolve():
        pytest.skip("not run by the environment of `make test`, .venv")
    installed = {canonical(found.metadata["Name"]): found.version.partition("+")[0] for found in distributions()}
    wanted = pins_in("".join(map(lock, ("build", "requirements", "torch-cpu"))))
    assert {package: installed.get(package) for package in wanted} == wanted


def test_tracked_files_name_no_registry_and_no_path_of_one_machine():
    # Written in pieces, so that this file does not hold what it looks for.
    options = "|".join(f"--{name}" for name in ("index-url", "extra-index-url", "find-links", "trusted-host"))
    option = re.compile(rf"(?:{options})[ =]+(?:\w+:)?/")
    names = (
        ("pypi", "org"),
        ("pythonhosted", "org"),
        ("npmjs", "org"),
        ("anaconda", "org"),
        ("debian", "org"),
    )
    hosts = re.compile("|".join(re.escape(".".join(name)) for name in names))
    folders = re.compile("|".join(rf"(?<![\w.}}]){re.escape('/' + name + '/')}" for name in ("opt", "work", "root")))
    found = []
    for path in tracked_files():
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue  # weights and pictures
        for kind in (option, hosts, folders):
            found += [f"{path.relative_to(ROOT)}: {match.group()}" for match in kind.finditer(text)]
    assert found == []


def test_whoever_opens_a_checkpoint_says_that_its_code_is_not_trusted():
    """Where nothing is said, transformers asks on the terminal, and AutoRound runs the code."""
    openers, found = re.compile(r"AutoRound|.*\.from_pretrained|.*Auto\w+\.from_config"), []
    folders = ("src", "scripts", "demo", "benchmarks")
    for path in sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and openers.fullmatch(ast.unparse(node.func)):
                said = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
                found.append((f"{path.relative_to(ROOT)}:{node.lineno}", said.get("trust_remote_code")))
    assert len(found) >= 7
    assert [place for place, said in found if said != "False"] == []


def test_every_script_is_the_script_of_the_rule_of_its_name():
    rules = {}
    for path in sorted((ROOT / "rules").glob("*.smk")):
        text = path.read_text(encoding="utf-8")
        for block in re.split(r"^(?=(?:rule|checkpoint) )", text, flags=re.MULTILINE)[1:]:
            name = re.match(r"\w+ (\w+)", block).group(1)
            script = re.search(r'^    script:\s+"\.\./scripts/([\w.]+)"', block, re.MULTILINE)
            if script:
                rules[name] = script.group(1)
            assert re.search(r"^    run:", block, re.MULTILINE) is None, f"{name} has a run: block"
    assert rules == {name: f"{name}.py" for name in rules}
    assert sorted(rules.values()) == sorted(path.name for path in (ROOT / "scripts").glob("*.py"))


@pytest.mark.parametrize("path", sorted((ROOT / "profiles").glob("*/*.yaml")), ids=lambda path: path.parent.name)
def test_every_entry_of_a_profile_says_why(path):
    lines = path.read_text(encoding="utf-8").splitlines()
    entries = [number for number, line in enumerate(lines) if re.match(r"[a-z-]+:", line)]
    assert len(entries) == len(yaml.safe_load("\n".join(lines)))
    for number in entries:
        assert lines[number - 1].startswith("# "), f"{path.name}: no reason above '{lines[number]}'"


def test_make_help_lists_every_target():
    text = subprocess.run(["make", "help"], cwd=ROOT, check=True, capture_output=True, text=True).stdout
    targets = re.search(r"^\.PHONY: (.*)$", MAKEFILE, re.MULTILINE).group(1).split()
    assert [target for target in targets if f"make {target} " not in text] == []


def test_make_names_the_pythons_that_the_locks_are_for(tmp_path):
    """A Python that is too old ends in one line that says what to do, and makes nothing."""
    old = tmp_path / "python"
    old.write_text("#!/bin/sh\nexit 1\n", encoding="utf-8")
    old.chmod(0o755)
    command = ["make", "environment", f"PYTHON={old}", f"VENV={tmp_path / 'venv'}"]
    made = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert made.returncode != 0
    assert "The locks are for Python 3.11" in made.stderr and str(old) in made.stderr
    assert not (tmp_path / "venv").exists()


def test_commands_that_are_shown_run_as_they_stand():
    """Snakemake runs no job without --cores, and takes what follows --configfile for another such file."""
    shown = [ROOT / "README.md", ROOT / "Snakefile", *ROOT.glob("docs/*.md"), *ROOT.glob("scripts/*.py")]
    shown += (ROOT / "src/requant/templates").glob("*.j2")
    commands = [
        (path.name, command.split())
        for path in shown
        for command in re.findall(r"snakemake (-[^`#\n]*|lock\b[^`\n]*)", path.read_text(encoding="utf-8"))
    ]
    assert len(commands) > 8
    for name, words in commands:
        targets = [word for word in words if word in ("lock", "model_card.md") or word.startswith("results/")]
        assert not targets or "--cores" in words, f"{name}: snakemake {' '.join(words)}"
        if "--configfile" in words:
            assert words.index("--configfile") >= len(words) - 2, f"{name}: snakemake {' '.join(words)}"


def ran_ci(tmp_path: Path, knows: dict[str, str]) -> list[str]:
    """What .ci/run calls, a line each, on a machine whose dpkg-query knows the state of these packages alone."""
    calls = tmp_path / "calls"
    states = "\n".join(f"{name}) printf {state};;" for name, state in knows.items())
    query = f'case "${{@: -1}}" in\n{states}\n*) echo "no packages found matching ${{@: -1}}" >&2; exit 1;;\nesac'
    for program, does in {"dpkg-query": query, "apt-get": "", "make": ""}.items():
        noted = "" if program == "dpkg-query" else f'echo "{program} $*" >>"{calls}"\n'
        (tmp_path / program).write_text(f"#!/bin/bash\n{noted}{does}\n", encoding="utf-8")
        (tmp_path / program).chmod(0o755)
    path = f"{tmp_path}:/usr/bin:/bin"
    subprocess.run([ROOT / ".ci/run"], env={"PATH": path}, check=True, capture_output=True, timeout=60)
    return calls.read_text(encoding="utf-8").splitlines()


def apt_packages() -> list[str]:
    lines = (ROOT / "tests/apt.txt").read_text(encoding="utf-8").splitlines()
    return [line.partition("#")[0].strip() for line in lines if line.partition("#")[0].strip()]


def test_ci_installs_the_packages_that_are_missing(tmp_path):
    first, second, third, *rest = apt_packages()
    some = {first: "installed", second: "config-files", **dict.fromkeys(rest, "installed")}
    all_there = dict.fromkeys(apt_packages(), "installed")
    install, then = "apt-get install -y -qq --no-install-recommends", "make test PYTEST_ARGS=--only-gpu-skips"
    found = {}
    for name, knows in {"nothing": {}, "some": some, "all": all_there}.items():
        (tmp_path / name).mkdir()
        found[name] = ran_ci(tmp_path / name, knows)
    assert found["nothing"] == ["apt-get update -qq", f"{install} {' '.join(apt_packages())}", then]
    assert found["some"] == ["apt-get update -qq", f"{install} {second} {third}", then]
    assert found["all"] == [then]


def test_licence_is_apache_2():
    assert "Apache License\n                           Version 2.0" in (ROOT / "LICENSE").read_text(encoding="utf-8")
    assert 'license = "Apache-2.0"' in (ROOT / "pyproject.toml").read_text(encoding="utf-8")

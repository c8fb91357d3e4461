"""flake.nix as far as it can be known without a network: evaluated by Nix, with nixpkgs replaced by tests/nix.

Names, types, hashes and paths are evaluated; nothing is built. What is broken on purpose has to fail.
"""

import hashlib
import importlib.util
import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FLAKE = (ROOT / "flake.nix").read_text(encoding="utf-8")
SYSTEM = "x86_64-linux"
PROMISED = {
    "apps": {"cpu", "default", "requant"},
    "checks": {"default"},
    "devShells": {"default"},
    "packages": {"cpu", "default", "testing", "wheels-base", "wheels-cpu", "wheels-cuda", "wheels-test"},
}
RECORD = json.loads((ROOT / "envs/wheelhouse.json").read_text(encoding="utf-8"))


def loaded_wheelhouse():
    """envs/wheelhouse.py as a module."""
    spec = importlib.util.spec_from_file_location("wheelhouse", ROOT / "envs/wheelhouse.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


wheelhouse = loaded_wheelhouse()


class Checkout:
    """A copy of what flake.nix names, and Nix on it."""

    def __init__(self, folder: Path):
        self.folder = folder
        for part in {"flake.nix", "flake.lock", "tests/nix", *re.findall(r"(?<![.\w])\./([\w./-]*\w)", FLAKE)}:
            target = folder / part
            target.parent.mkdir(parents=True, exist_ok=True)
            if (ROOT / part).is_dir():
                ignored = shutil.ignore_patterns("__pycache__", "*.egg-info")
                shutil.copytree(ROOT / part, target, dirs_exist_ok=True, ignore=ignored)
            else:
                shutil.copy(ROOT / part, target)

    def edit(self, part: str, old: str, new: str) -> None:
        """Replace the first `old` of a file, which has to be there."""
        path = self.folder / part
        text = path.read_text(encoding="utf-8")
        assert old in text, f"{part} has no {old!r}"
        path.write_text(text.replace(old, new, 1), encoding="utf-8")

    def nix(self, *arguments: str, of: str = "") -> subprocess.CompletedProcess:
        """Run Nix, without a network, on this flake's attribute `of`."""
        command = ["nix", "--extra-experimental-features", "nix-command flakes", "--offline", *arguments]
        return subprocess.run([*command, f"path:{self.folder}{of}"], capture_output=True, text=True)

    def with_stub(self, *arguments: str, of: str = "") -> subprocess.CompletedProcess:
        """Run Nix with tests/nix in place of nixpkgs."""
        stub = ["--no-write-lock-file", "--override-input", "nixpkgs", f"path:{self.folder / 'tests/nix'}"]
        return self.nix(*arguments, *stub, of=of)

    def value(self, attribute: str):
        """What an attribute of the flake evaluates to."""
        evaluated = self.with_stub("eval", "--json", of=f"#{attribute}")
        assert evaluated.returncode == 0, evaluated.stderr
        return json.loads(evaluated.stdout)

    def outputs(self) -> dict[str, set[str]]:
        """{kind: names} of the outputs that `nix flake show` lists."""
        shown = self.with_stub("flake", "show", "--json")
        assert shown.returncode == 0, shown.stderr
        return {kind: set(systems[SYSTEM]) for kind, systems in json.loads(shown.stdout).items()}


@pytest.fixture
def checkout(tmp_path) -> Checkout:
    if shutil.which("nix") is None:
        pytest.skip("needs nix (Debian: nix-bin)")
    return Checkout(tmp_path / "checkout")


def environment(checkout: Checkout) -> str:
    """The store path of the environment, by which a build knows it (REQUANT_ENVIRONMENT)."""
    return checkout.value(f"packages.{SYSTEM}.default.outPath")


def card(checkout: Checkout) -> str:
    return checkout.value(f"apps.{SYSTEM}.default.program")


@pytest.mark.nix
def test_flake_has_its_outputs(checkout):
    checked = checkout.with_stub("flake", "check", "--no-build")
    assert checked.returncode == 0, checked.stderr
    assert checkout.outputs() == PROMISED
    for app in sorted(PROMISED["apps"]):
        program = checkout.value(f"apps.{SYSTEM}.{app}.program")
        assert re.fullmatch(r"/nix/store/\w{32}-[\w-]+/bin/requant(-card)?", program)


@pytest.mark.nix
def test_flake_lock_is_in_step_with_the_flake(checkout):
    told = checkout.nix("flake", "metadata", "--no-update-lock-file", "--json")
    assert told.returncode == 0, told.stderr
    assert json.loads(told.stdout)["locks"] == json.loads((ROOT / "flake.lock").read_text(encoding="utf-8"))


@pytest.mark.nix
def test_changed_input_is_out_of_step_with_the_lock(checkout):
    checkout.edit("flake.nix", "NixOS/nixpkgs/nixos-26.05", "NixOS/nixpkgs/nixos-25.11")
    told = checkout.nix("flake", "metadata", "--no-update-lock-file")
    assert told.returncode != 0 and "nixos-25.11" in told.stderr


BROKEN = {
    "syntax": ("flake.nix", "      inherit (pkgs) lib;", "      inherit (pkgs) lib", "syntax error"),
    "a package that nixpkgs lacks": ("flake.nix", "pkgs.rdma-core", "pkgs.rdma-kernel", "'rdma-kernel' missing"),
    "a name that nothing defines": ("flake.nix", "cpu = card cpu;", "cpu = card cpux;", "undefined variable 'cpux'"),
    "an output that is no package": ("flake.nix", "wheels-cpu = cpuWheel;", "wheels-cpu = 1;", "not a derivation"),
    "a list that is not there": ("flake.nix", "./envs/test.lock", "./envs/tests.lock", "tests.lock"),
    "a hash too short": ("envs/wheelhouse.json", '"hash": "sha256-', '"hash": "sha256-A', "hash"),
    "a hash of no known kind": ("envs/wheelhouse.json", '"hash": "sha256-', '"hash": "sha25-', "hash"),
    "a record cut off": ("envs/wheelhouse.json", '"bytes"', "", "parse error"),
    "a changed list": (
        "envs/requirements.lock",
        "absl",
        "abls",
        "envs/wheelhouse.json is of another requirements.lock",
    ),
}


@pytest.mark.nix
@pytest.mark.parametrize(("part", "old", "new", "message"), BROKEN.values(), ids=BROKEN)
def test_broken_flake_fails(checkout, part, old, new, message):
    checkout.edit(part, old, new)
    checked = checkout.with_stub("flake", "check", "--no-build")
    shown = checkout.with_stub("flake", "show", "--json")
    assert checked.returncode != 0 or shown.returncode != 0
    assert message in checked.stderr + shown.stderr


@pytest.mark.nix
@pytest.mark.parametrize("kind", PROMISED)
def test_missing_output_is_noticed(checkout, kind):
    """Nix itself only warns of an output whose name it does not know."""
    checkout.edit("flake.nix", f"      {kind}.${{system}}", f"      no{kind}.${{system}}")
    shown = checkout.with_stub("flake", "show", "--json")
    assert shown.returncode == 0, shown.stderr
    assert json.loads(shown.stdout).keys() == PROMISED.keys() - {kind} | {f"no{kind}"}


@pytest.mark.nix
def test_missing_file_of_the_workflow_fails(checkout):
    (checkout.folder / "Snakefile").unlink()
    evaluated = checkout.with_stub("eval", "--json", of=f"#apps.{SYSTEM}.default.program")
    assert evaluated.returncode != 0 and "Snakefile does not exist" in evaluated.stderr


@pytest.mark.nix
def test_environment_is_of_the_locks_alone(checkout):
    before = environment(checkout), card(checkout)
    (checkout.folder / "README.md").write_text("another sentence\n", encoding="utf-8")
    assert (environment(checkout), card(checkout)) == before

    checkout.edit("src/requant/__init__.py", '"""', '"""Changed. ')
    assert environment(checkout) == before[0] and card(checkout) != before[1]

    checkout.edit("envs/torch-cuda.lock", "# Made by", "# made by")
    new = hashlib.sha256((checkout.folder / "envs/torch-cuda.lock").read_bytes()).hexdigest()
    checkout.edit("envs/wheelhouse.json", RECORD["cuda"]["locks"]["torch-cuda.lock"], new)
    assert environment(checkout) != before[0]


@pytest.mark.nix
def test_fetched_files_have_the_recorded_hashes(checkout):
    for name in wheelhouse.WHEELHOUSES:
        assert checkout.value(f"packages.{SYSTEM}.wheels-{name}.outputHash") == RECORD[name]["hash"]


@pytest.mark.nix
def test_cpu_wheel_is_the_one_of_its_lock(checkout):
    version, digest = re.search(
        r"torch==(\S+) .*sha256:(\w+)", (ROOT / "envs/torch-cpu.lock").read_text(encoding="utf-8"), re.DOTALL
    ).groups()
    (line,) = checkout.value(f"packages.{SYSTEM}.wheels-cpu.paths")
    name, path = line.split()
    assert name == f"torch-{version}-cp311-cp311-manylinux_2_28_x86_64.whl"
    command = ["nix-store", "--print-fixed-path", "sha256", digest, name]
    assert path == subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


@pytest.mark.nix
def test_folder_hash_is_the_one_of_nix(checkout, tmp_path):
    """Names in an order that upper case and dots decide; sizes round the eight bytes that files are padded to."""
    folder = tmp_path / "files"
    folder.mkdir()
    for name, size in {"a-b.whl": 0, "a.b.whl": 7, "B.whl": 8, "a_b+cpu.whl": 9, "a": 100_000}.items():
        (folder / name).write_bytes(bytes(range(256)) * (size // 256) + bytes(size % 256))
    command = ["nix", "--extra-experimental-features", "nix-command", "hash", "path", str(folder)]
    assert wheelhouse.nar_hash(folder) == subprocess.run(command, capture_output=True, text=True).stdout.strip()


def test_recorded_hashes_belong_to_the_present_locks():
    """A change of a lock has to come with `make wheelhouses`."""
    assert RECORD.keys() == wheelhouse.WHEELHOUSES.keys()
    for name in wheelhouse.WHEELHOUSES:
        assert RECORD[name]["locks"] == wheelhouse.lock_hashes(name), f"envs/*.lock of {name!r}: make wheelhouses"


def test_every_lock_is_fetched_for_nix_or_handed_over_but_that_of_clusters():
    fetched = {lock for locks in wheelhouse.WHEELHOUSES.values() for lock in locks}
    assert fetched | {"torch-cpu.lock", "cluster.lock"} == {path.name for path in (ROOT / "envs").glob("*.lock")}


def test_wheelhouse_of_an_unchanged_lock_is_not_fetched_again(tmp_path, capsys, monkeypatch):
    record = tmp_path / "wheelhouse.json"
    shutil.copy(wheelhouse.RECORD, record)
    monkeypatch.setattr(wheelhouse, "RECORD", record)
    wheelhouse.fill_changed(tmp_path / "none")
    assert capsys.readouterr().out.count("of the same locks as before") == len(wheelhouse.WHEELHOUSES)
    assert not (tmp_path / "none").exists()
    assert json.loads(record.read_text(encoding="utf-8")) == RECORD


def test_only_libcuda_may_be_missing():
    ignored = re.findall(r"autoPatchelfIgnoreMissingDeps = (.*?);", FLAKE)
    assert ignored == ['[ "libcuda.so.1" ]']

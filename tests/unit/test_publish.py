"""What goes out with a release: hashes, signature, bill of materials, scores for the hub."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from huggingface_hub import parse_eval_result_entries

from requant.checksums import write_sums
from requant.config import HubTask, parse
from requant.errors import RequantError
from requant.eval_results import eval_results
from requant.hashing import file_entry
from requant.records import BenchmarkRecord, Score
from requant.sbom import bill_of_materials
from requant.signature import check_key, sign

OTHERS = ["README.md", ".eval_results/requant.yaml"]


@pytest.fixture
def folder(tmp_path) -> Path:
    """A release of two packed files and two others, one of them hidden."""
    folder = tmp_path / "model"
    for name in ("model-00001-of-00001.safetensors", "config.json", *OTHERS):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(f"what stands in {name}")
    return folder


def packed(folder: Path) -> dict:
    return {name: file_entry(folder / name) for name in ("model-00001-of-00001.safetensors", "config.json")}


def write_key(path: Path, key, mode=0o600, password=None) -> Path:
    hidden = serialization.BestAvailableEncryption(password) if password else serialization.NoEncryption()
    path.write_bytes(key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, hidden))
    path.chmod(mode)
    return path


# SHA256SUMS


def test_sha256sum_takes_the_sums_and_finds_a_changed_file(folder):
    write_sums(folder, packed(folder), OTHERS)
    names = [line.split("  ")[1] for line in (folder / "SHA256SUMS").read_text().splitlines()]
    assert names == [".eval_results/requant.yaml", "README.md", "config.json", "model-00001-of-00001.safetensors"]
    check = [shutil.which("sha256sum"), "--check", "--strict", "SHA256SUMS"]
    assert subprocess.run(check, cwd=folder, capture_output=True).returncode == 0
    (folder / "config.json").write_text("changed")
    done = subprocess.run(check, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 1 and "config.json: FAILED" in done.stdout


def test_what_an_earlier_build_signed_and_scored_is_no_stranger_and_does_not_stay(folder):
    for name in ("SHA256SUMS", "model.sig"):
        (folder / name).write_text("old")
    write_sums(folder, packed(folder), [name for name in OTHERS if not name.startswith(".eval_results")])
    assert not (folder / "model.sig").exists() and not (folder / ".eval_results/requant.yaml").exists()
    assert ".eval_results" not in (folder / "SHA256SUMS").read_text()


@pytest.mark.parametrize(
    ("edit", "line"),
    [
        (lambda folder: (folder / "notes/mine.txt").parent.mkdir() or (folder / "notes/mine.txt").write_text("x"),
         "notes/mine.txt: not made by this build"),
        (lambda folder: (folder / "README.md").unlink(), "README.md: not there"),
        (lambda folder: (folder / "config.json").write_text("x"), "config.json: sha256 2d71.* found; pack.json has"),
    ],
)  # fmt: skip
def test_a_file_that_is_strange_gone_or_changed_is_named_and_nothing_is_written(folder, edit, line):
    entries = packed(folder)
    edit(folder)
    with pytest.raises(RequantError, match=line):
        write_sums(folder, entries, OTHERS)
    assert not (folder / "SHA256SUMS").exists()


# model.sig


def verify(folder: Path, public: Path) -> subprocess.CompletedProcess:
    """The command that stands on the card, run in the folder of the release."""
    card = Path(__file__).parents[2] / "src/requant/templates/sections.md.j2"
    line = next(line for line in card.read_text().splitlines() if line.startswith("model_signing verify"))
    words = line.replace("publisher.pem", str(public)).split()
    return subprocess.run([sys.executable, "-m", *words], cwd=folder, capture_output=True, text=True)


def test_the_command_on_the_card_verifies_the_signature_and_finds_what_was_changed(folder, tmp_path):
    key = ec.generate_private_key(ec.SECP256R1())
    private, public = write_key(tmp_path / "key.pem", key), tmp_path / "public.pem"
    form = serialization.PublicFormat.SubjectPublicKeyInfo
    public.write_bytes(key.public_key().public_bytes(serialization.Encoding.PEM, form))
    write_sums(folder, packed(folder), OTHERS)
    sign(folder, private)
    sign(folder, private)  # once more: the signature there is not part of what is signed
    done = verify(folder, public)
    assert done.returncode == 0, done.stdout + done.stderr
    assert str(tmp_path) not in (folder / "model.sig").read_text()
    assert sorted(path.name for path in folder.iterdir()) == [
        ".eval_results", "README.md", "SHA256SUMS", "config.json", "model-00001-of-00001.safetensors", "model.sig"
    ]  # fmt: skip
    secret = private.read_text().splitlines()[1]
    assert not [
        path for path in tmp_path.rglob("*") if path.is_file() and path != private and secret in path.read_text()
    ]
    for name in (".eval_results/requant.yaml", ".gitignore"):
        before = (folder / name).read_text() if (folder / name).exists() else None
        (folder / name).write_text("changed or added")
        assert verify(folder, public).returncode != 0, name
        (folder / name).unlink() if before is None else (folder / name).write_text(before)
    (folder / ".gitattributes").write_text("of the hub")
    (folder / ".cache").mkdir()
    (folder / ".cache/state").write_text("of a download")
    assert verify(folder, public).returncode == 0


def test_a_key_that_can_not_be_used_is_refused_in_one_line(tmp_path):
    elliptic = ec.generate_private_key(ec.SECP256R1())
    keys = {
        "mode 644: others can read it": write_key(tmp_path / "open.pem", elliptic, mode=0o644),
        "has a password": write_key(tmp_path / "locked.pem", elliptic, password=b"word"),
        "no EC key": write_key(tmp_path / "rsa.pem", rsa.generate_private_key(65537, 2048)),
        "curve secp256k1": write_key(tmp_path / "k1.pem", ec.generate_private_key(ec.SECP256K1())),
        "No such file": tmp_path / "none.pem",
        "no private key in PEM": tmp_path / "text.pem",
        "no file": tmp_path / "folder",
    }
    keys["no private key in PEM"].write_text("-----BEGIN SOMETHING-----")
    keys["no private key in PEM"].chmod(0o600)
    keys["no file"].mkdir()
    for line, path in keys.items():
        with pytest.raises(RequantError, match=f"publish.signing_key: {path}: {line}") as caught:
            check_key(path)
        assert "\n" not in str(caught.value) and "expected" in str(caught.value)
    check_key(write_key(tmp_path / "good.pem", elliptic))


# sbom.cdx.json


def test_the_bill_of_materials_is_valid_lists_what_is_installed_and_names_no_place(monkeypatch):
    from cyclonedx.schema import SchemaVersion
    from cyclonedx.validation.json import JsonStrictValidator

    text = bill_of_materials()
    assert JsonStrictValidator(SchemaVersion.V1_6).validate_str(text) is None
    found = json.loads(text)
    assert {"torch", "safetensors", "snakemake"} <= {component["name"] for component in found["components"]}
    assert "serialNumber" not in found and "timestamp" not in found["metadata"]
    assert found["$schema"] == "http://cyclonedx.org/schema/bom-1.6.schema.json"
    assert "file://" not in text and '"url"' not in text
    assert sys.prefix not in text and os.getcwd() not in text
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1000000000")
    assert bill_of_materials() == text


# .eval_results


def record() -> BenchmarkRecord:
    score = {"higher_is_better": True, "stderr": 0.01, "samples": 100}
    return BenchmarkRecord(
        subject="r",
        benchmark="default",
        harness="lm_eval",
        harness_version="0.4.13",
        settings={},
        arithmetic="BF16 weights",
        scores=[
            Score(task="gsm8k", metric="exact_match", value=0.75, **score),
            Score(task="mine", metric="acc", value=0.5, **score),
        ],
        source_scores=None,
        recovery=None,
        seconds=1.5,
        peak_memory_bytes=1,
    )


def test_scores_on_data_of_the_hub_are_read_back_by_its_library():
    tasks = {"gsm8k": HubTask(dataset="openai/gsm8k", task="gsm8k", metric="exact_match", revision="0" * 40)}
    (entry,) = parse_eval_result_entries(yaml.safe_load(eval_results(record(), tasks)))
    assert (entry.dataset_id, entry.task_id, entry.value) == ("openai/gsm8k", "gsm8k", 0.75)
    assert entry.dataset_revision == "0" * 40 and entry.date is None
    assert entry.notes == "lm-eval 0.4.13; BF16 weights"


def test_a_score_that_was_not_measured_is_an_error_that_names_those_that_were():
    tasks = {"gsm8k": HubTask(dataset="openai/gsm8k", task="gsm8k", metric="acc")}
    line = "benchmarks.default.hub.gsm8k: no score gsm8k/acc was measured; there: gsm8k/exact_match, mine/acc"
    with pytest.raises(RequantError, match=line):
        eval_results(record(), tasks)


@pytest.mark.parametrize(
    ("task", "line"),
    [
        ({"dataset": "gsm8k", "task": "gsm8k", "metric": "acc"}, "benchmarks.b.hub.gsm8k.dataset: 'gsm8k'; expected"),
        ({"dataset": "a/b", "metric": "acc"}, "benchmarks.b.hub.gsm8k.task: missing; expected: name of the task"),
        ({"dataset": "a/b", "task": "t", "metric": "acc", "revision": "main"}, "hub.gsm8k.revision: 'main'; expected"),
    ],
)
def test_a_benchmark_of_the_hub_has_a_data_set_a_task_and_a_metric(task, line):
    config = {
        "models": {"m": {"path": "m"}},
        "benchmarks": {"b": {"hub": {"gsm8k": task}}},
        "releases": {"r": {"model": "m", "scheme": "W4A16", "benchmark": "b"}},
        "build": ["r"],
    }
    with pytest.raises(RequantError, match=line):
        parse(config)

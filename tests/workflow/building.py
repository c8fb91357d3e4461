"""Running whole builds in a directory of their own: tiny models, real stages."""

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import tiny
import yaml
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

ROOT = Path(__file__).resolve().parents[2]
PLUGINS = Path(sys.prefix) / "cluster"

TASK = """\
task: tiny
dataset_path: json
dataset_kwargs: {data_files: {test: tasks/rows.jsonl}}
test_split: test
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: " {{answer}}"
generation_kwargs: {until: ["."], max_gen_toks: 4, do_sample: false}
metric_list:
  - {metric: exact_match, aggregation: mean, higher_is_better: true}
"""

CONFIG = {
    "models": {
        "ds": {"path": "models/ds", "license": "apache-2.0", "base_model": "tests/tiny-deepseek"},
        "qw": {"path": "models/qw", "license": "apache-2.0", "base_model": "tests/tiny-qwen"},
        "ll": {"path": "models/ll", "license": "apache-2.0", "base_model": "tests/tiny-llama"},
    },
    "calibrations": {
        "small": {
            "sources": [{"path": "text/a.txt", "share": 0.75}, {"path": "text/b.txt", "share": 0.25}],
            "nsamples": 8,
            "seqlen": 48,
            "heldout": {"nsamples": 4},
        },
        "padded": {
            "sources": [{"path": "text/a.txt"}],
            "nsamples": 8,
            "seqlen": 64,
            "pack": "pad",
            "heldout": {"nsamples": 4},
        },
    },
    "benchmarks": {"tiny": {"tasks": ["tiny"], "include_path": "tasks", "batch_size": 4}},
    "releases": {
        "ds-nvfp4": {"model": "ds", "scheme": "NVFP4", "calibration": "small", "benchmark": "tiny"},
        "ds-w3a16": {"model": "ds", "scheme": "W3A16", "calibration": "small", "benchmark": "tiny"},
        "qw-w3a16": {
            "model": "qw",
            "scheme": "W3A16",
            "calibration": "padded",
            "benchmark": "tiny",
            "keep": [r"layers\.2\.mlp\.experts\.3\.", r"layers\.1\.self_attn\.q_proj"],
        },
        "ll-nvfp4": {"model": "ll", "scheme": "NVFP4", "calibration": "small", "benchmark": "tiny"},
    },
    "build": ["ds-nvfp4", "ds-w3a16", "qw-w3a16", "ll-nvfp4"],
}
BRIEF = {"concurrency": [1, 2], "max_tokens": 3, "repeats": 1, "warmup": 0}  # throughput, where speed is no matter
MODELS = {"ds": "deepseek_v3", "qw": "qwen3_moe", "ll": "llama"}


@dataclass(frozen=True)
class Build:
    """A directory that a build runs in. configfiles: as seen from there, later ones merged into earlier ones."""

    directory: Path
    configfiles: tuple[str, ...] = ("mine.yaml",)

    def command(self, *arguments: str) -> list[str]:
        options = ["--snakefile", str(ROOT / "Snakefile"), "--configfile", *self.configfiles, "--cores", "2"]
        return [sys.executable, "-m", "snakemake", *options, *arguments]

    def run(self, *arguments: str, check: bool = True) -> subprocess.CompletedProcess:
        """Runs snakemake here; with `check`, a failure shows its output."""
        done = subprocess.run(
            self.command(*arguments),
            cwd=self.directory,
            env=environment(),
            capture_output=True,
            text=True,
            timeout=1500,
        )
        assert not check or done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
        return done

    def start(self, *arguments: str, **settings) -> subprocess.Popen:
        """Starts snakemake here; settings: further ones of Popen."""
        return subprocess.Popen(self.command(*arguments), cwd=self.directory, env=environment(), **settings)

    def configure(self, change) -> None:
        """Rewrites mine.yaml after `change` has edited its data."""
        path = self.directory / "mine.yaml"
        data = yaml.safe_load(path.read_text())
        change(data)
        path.write_text(yaml.safe_dump(data))

    def planned(self, *arguments: str) -> dict[str, int]:
        """Jobs by rule that a dry run would run."""
        done = self.run(*arguments, "-n")
        lines = (done.stdout + done.stderr).splitlines()
        if not any(line.startswith("Job stats") for line in lines):
            return {}
        start = next(number for number, line in enumerate(lines) if line.startswith("Job stats"))
        rows = (line.split() for line in lines[start + 3 :])
        jobs = {}
        for row in rows:
            if len(row) != 2 or not row[1].isdigit():
                break
            jobs[row[0]] = int(row[1])
        return {rule: count for rule, count in jobs.items() if rule not in ("all", "total")}


def environment() -> dict[str, str]:
    """The environment of a build: nothing of pytest's, one thread a job."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST")}
    return kept | {"OMP_NUM_THREADS": "1"}


def with_plugins(settings: dict[str, str]) -> dict[str, str]:
    """An environment that has the plugins of envs/cluster.lock too; skips where `make test` has not installed them."""
    if not PLUGINS.is_dir():
        pytest.skip(f"needs {PLUGINS}, which `make test` installs from envs/cluster.lock")
    path = os.pathsep.join(filter(None, [settings.get("PYTHONPATH"), str(PLUGINS)]))
    return settings | {"PYTHONPATH": path}


def lay_out(directory: Path, models: tuple[str, ...] = tuple(MODELS), iters: int = 2) -> Build:
    """A working directory with tiny models, texts, a benchmark and mine.yaml."""
    for name in models:
        shard = "1GB" if name == "ll" else "400KB"  # one file without an index, or several with one
        tiny.write_checkpoint(directory / "models" / name, MODELS[name], seed=7, shard_size=shard)
    tiny.write_text(directory / "text/a.txt", 300, 1)
    tiny.write_text(directory / "text/b.txt", 300, 2)
    (directory / "tasks").mkdir()
    (directory / "tasks/tiny.yaml").write_text(TASK)
    rows = ['{"question": "the cat sat on", "answer": "the mat"}'] * 6
    (directory / "tasks/rows.jsonl").write_text("\n".join(rows) + "\n")
    releases = {name: dict(r) for name, r in CONFIG["releases"].items() if r["model"] in models}
    for release in releases.values():
        release["tuning"] = {"iters": iters, "batch_size": 4}
        release["deploy"] = {"prompts": 2, "prompt_tokens": 12, "max_tokens": 4, "throughput": BRIEF}
    data = CONFIG | {
        "models": {name: CONFIG["models"][name] for name in models},
        "releases": releases,
        "build": list(releases),
    }
    (directory / "mine.yaml").write_text(yaml.safe_dump(data))
    return Build(directory)


def write_keys(directory: Path) -> None:
    """key.pem, which a release may be signed by, and public.pem."""
    key, pem = ec.generate_private_key(ec.SECP256R1()), serialization.Encoding.PEM
    hidden = key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    (directory / "key.pem").touch(mode=0o600)
    (directory / "key.pem").write_bytes(hidden)
    shown = key.public_key().public_bytes(pem, serialization.PublicFormat.SubjectPublicKeyInfo)
    (directory / "public.pem").write_bytes(shown)

"""Engines of a target that are programs of this machine: what they are started with, and what is recorded."""

import json
import os
import sys
from pathlib import Path

import pytest

from requant.config import Target
from requant.engines import serve_at
from requant.errors import RequantError

# Stands in for vLLM, which has no CPU build here: it writes down how it was started, and answers health checks.
VLLM = f"""#!{sys.executable}
import http.server, json, os, sys
class Answers(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
open("started.json", "w").write(json.dumps([sys.argv[1:], dict(os.environ)]))
port = int(sys.argv[sys.argv.index("--port") + 1])
http.server.HTTPServer(("127.0.0.1", port), Answers).serve_forever()
"""
# Stands in for the Python beside it, which is asked for vLLM's version.
PYTHON = f"""#!{sys.executable}
import sys
print("0.21.0" if "version('vllm')" in sys.argv[2] else "")
"""


def vllm(folder: Path) -> Target:
    """A target of vLLM as a program; `folder` has the stand-in."""
    folder.mkdir()
    (folder / "vllm").write_text(VLLM)
    (folder / "vllm").chmod(0o755)
    (folder / "python3").write_text(
        f"#!{sys.executable}\nimport sys\nprint('0.21.0' if 'vllm' in sys.argv[2] else '')\n"
    )
    (folder / "python3").chmod(0o755)
    return Target(
        engine="vllm",
        device="cuda",
        gpu="sm90",
        arguments=["--enforce-eager"],
        environment={"PATH": f"{folder}:{os.environ['PATH']}", "VLLM_LOGGING_LEVEL": "WARNING"},
        startup_seconds=30,
    )


@pytest.fixture
def checkpoint(tmp_path) -> Path:
    (tmp_path / "release").mkdir()
    (tmp_path / "release/config.json").write_text('{"quantization_config": {"quant_method": "compressed-tensors"}}')
    return tmp_path / "release"


def test_vllm_as_a_program_gets_the_targets_arguments_and_environment(tmp_path, checkpoint):
    """What came with the checkpoint is not taken for modules of Python's."""
    for module in ("ctypes", "importlib", "signal"):
        (tmp_path / f"{module}.py").write_text("raise SystemExit('trapped')")
    with serve_at(vllm(tmp_path / "bin"), checkpoint, tmp_path / "log", name="mine") as server:
        arguments, environment = json.loads((tmp_path / "started.json").read_text())
    port = server.url.removeprefix("http://127.0.0.1:")
    assert " ".join(arguments) == (
        f"serve release --served-model-name mine --host 127.0.0.1 --port {port} --tensor-parallel-size 1 "
        "--quantization compressed-tensors --gpu-memory-utilization 0.85 --enforce-eager"
    )
    assert environment["VLLM_LOGGING_LEVEL"] == "WARNING" and environment["HF_HUB_OFFLINE"] == "1"
    assert environment["PYTHONSAFEPATH"] == "1"
    assert "OMP_NUM_THREADS" not in environment or environment["OMP_NUM_THREADS"] == os.environ["OMP_NUM_THREADS"]
    assert server.model == "mine" and server.engine == "vllm serve" and server.version == "0.21.0"
    shown = ["vllm", *arguments]
    shown[2], shown[shown.index(port)] = "{model}", "{port}"
    assert server.command == shown and server.container is None


def test_transformers_as_a_program_gets_the_targets_arguments(tmp_path, checkpoint):
    target = Target(startup_seconds=60).model_copy(update={"arguments": ["--no-such-option"]})  # past the schema
    with (
        pytest.raises(RequantError, match="status 2 before it served"),
        serve_at(target, checkpoint, tmp_path / "log"),
    ):
        pass
    assert "--no-such-option" in (tmp_path / "log").read_text()


def test_an_engine_that_is_not_installed_is_one_line(tmp_path, checkpoint):
    target = vllm(tmp_path / "bin").model_copy(update={"environment": {"PATH": str(tmp_path)}})
    with pytest.raises(RequantError) as raised, serve_at(target, checkpoint, tmp_path / "log"):
        pass
    assert str(raised.value) == (
        f"vllm: no such program in {tmp_path} or PATH; expected the serving engine: install `vllm`, or give the target "
        "an `image`"
    )

"""`requant serve`: what can't be served is one line, a dry run starts nothing, and what is started ends with Ctrl-C."""

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest
from tiny_checkpoint import make_packed, make_source

from requant.container import container_request
from requant.engine_command import docker_command
from requant.main import main
from requant.serve_folder import planned
from requant.target_files import FOLDER, target_named

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    return make_source(tmp_path_factory.mktemp("source") / "tiny")


@pytest.fixture(scope="module")
def packed(source, tmp_path_factory) -> Path:
    """The same in NVFP4, where a build leaves it."""
    return make_packed(source, tmp_path_factory.mktemp("release") / "tiny-nvfp4")


def serve(*arguments: str | Path) -> int:
    return main(["serve", *map(str, arguments)])


def refused(capsys, *arguments: str | Path) -> str:
    """The one line that ends `requant serve`."""
    assert serve(*arguments) == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line


def test_a_dry_run_shows_the_request_and_the_same_as_a_command(packed, capsys):
    arguments = (packed, "--target", "sm120-sglang", "--port", "30000", "--dry-run")
    assert serve(*arguments, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    target = target_named("sm120-sglang", None, ROOT / FOLDER)
    name = packed.parent.name if packed.name == "model" else packed.name
    request = container_request(target, packed, name, 30000, quantization="compressed-tensors")
    assert found["request"] == request and found["command"] == docker_command(request)
    assert found["model"] == str(packed) and found["decoded"] is None and found["target"] == "sm120-sglang"
    assert serve(*arguments) == 0
    shown, _, command = capsys.readouterr().out.partition("docker run")
    assert json.loads(shown[shown.index("{") :]) == request
    assert shlex.split(("docker run" + command).replace("\\\n", "")) == docker_command(request)


def test_a_dry_run_of_a_program_shows_its_variables(source, capsys, tmp_path):
    configfile = tmp_path / "mine.yaml"
    configfile.write_text("targets: {mine: {like: cpu-transformers, environment: {PATH: /two words}}}\n")
    assert serve(source, "--target", "mine", "--configfile", configfile, "--dry-run") == 0
    line = capsys.readouterr().out.replace("\\\n", "")
    assert shlex.split(line)[:5] == ["env", "PATH=/two words", "transformers", "serve", str(source)]


def test_weights_that_an_engine_would_get_wrong_are_decoded_first(packed, capsys):
    assert serve(packed, "--target", "cpu-transformers", "--dry-run", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["decoded"].startswith("transformers has no arithmetic in NVFP4") and found["request"] is None
    assert planned(packed, "x", target_named("sm120-sglang", None, ROOT / FOLDER)).why_decoded is None


def test_what_can_not_be_served_is_one_line(packed, source, capsys, tmp_path):
    hopper = tmp_path / "hopper.yaml"
    hopper.write_text("targets: {hopper: {like: sm100-sglang, gpu: sm90}}\n")
    said = refused(capsys, packed, "--target", "hopper", "--configfile", hopper, "--dry-run")
    assert said == (
        f"error: {packed}: can't be served at target 'hopper': sglang 0.5.16 refuses NVFP4 on sm90 (run on an H200, "
        "sm90: Current platform does not support w4a4 nvfp4 quantization); expected another target"
    )
    said = refused(capsys, source, "--target", "sm91-vllm", "--dry-run")
    assert said.startswith("error: --target sm91-vllm: no such target; expected one of cpu-docker, cpu-transformers")
    said = refused(capsys, tmp_path / "none", "--target", "cpu-transformers")
    assert said.startswith(f"error: {tmp_path}/none/config.json: not there; expected")
    configfile = tmp_path / "mine.yaml"
    configfile.write_text("targets: {mine: {like: sm90-vllm, memory_gb: 1.0e-4}}\n")
    said = refused(capsys, source, "--target", "mine", "--configfile", configfile, "--dry-run")
    assert said.startswith(f"error: {source}: does not fit target 'mine': weights take ")
    assert "MB of each device, 8 x 256 tokens of KV cache " in said and "; 0.09 MB are there (0.0001 GB x 0.85)" in said
    configfile.write_text("targets: {mine: {like: sm120-sglang, quantization: modelopt_fp4}}\n")
    said = refused(capsys, packed, "--target", "mine", "--configfile", configfile, "--dry-run")
    assert said.startswith(
        f"error: {packed}: its quantization is compressed-tensors, and the target's `quantization` is"
    )


def test_a_checkpoint_of_another_tool_is_left_to_the_engine(source, tmp_path, capsys):
    shutil.copytree(source, tmp_path, dirs_exist_ok=True)
    (tmp_path / "hf_quant_config.json").write_text('{"quantization": {"quant_algo": "NVFP4"}}')
    assert serve(tmp_path, "--target", "sm120-sglang", "--dry-run", "--json") == 0
    command = json.loads(capsys.readouterr().out)["command"]
    assert command[command.index("--quantization") + 1] == "modelopt_fp4"


def test_a_link_out_of_the_folder_is_refused_before_a_container_starts(source, packed, tmp_path, capsys):
    """Decoded weights, too, come with files that are copied."""
    for number, checkpoint in enumerate((source, packed)):
        place = tmp_path / str(number)
        shutil.copytree(checkpoint, place)
        (tmp_path / "secret").write_text("{}")
        (place / "generation_config.json").unlink(missing_ok=True)
        (place / "generation_config.json").symlink_to("../secret")
        said = refused(capsys, place, "--target", "cpu-docker", "--dry-run")
        assert said.startswith(f"error: {place}/generation_config.json: a link to '../secret'; expected a file in this")
        assert serve(place, "--target", "cpu-transformers", "--dry-run") == 0, "a program sees what you see"
        capsys.readouterr()


@pytest.mark.parametrize("port", ["0", "65536", "x", "-1"])
def test_a_port_is_a_number(port, source, capsys):
    with pytest.raises(SystemExit) as ended:
        serve(source, "--target", "cpu-transformers", "--port", port)
    assert ended.value.code == 2 and "expected a number from 1 to 65535" in capsys.readouterr().err


def test_it_serves_until_ctrl_c_and_leaves_nothing(packed, tmp_path):
    """A release in NVFP4, decoded for the CPU; the port is the one that was asked for."""
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "requant", "serve", str(packed), "--target", "cpu-transformers", "--json"]
    command += ["--port", str(port), "--log", str(tmp_path / "engine.log")]
    environment = os.environ | {"TMPDIR": str(tmp_path)}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
    try:
        line = process.stdout.readline()
        assert line, process.stderr.read()
        found = json.loads(line)
        assert found["url"] == f"http://127.0.0.1:{port}"
        data = {"model": found["model"], "prompt": "the cat", "max_tokens": 4, "temperature": 0}
        headers = {"Content-Type": "application/json"}
        request = urllib.request.Request(f"{found['url']}/v1/completions", json.dumps(data).encode(), headers)
        with urllib.request.urlopen(request, timeout=60) as answer:
            assert json.load(answer)["usage"]["completion_tokens"] == 4
        process.send_signal(signal.SIGINT)
        assert process.wait(30) == 0, process.stderr.read()
    finally:
        process.kill()
        process.wait()
    assert [path.name for path in tmp_path.iterdir()] == ["engine.log"], "the decoded copy is gone"
    with socket.socket() as probe:
        assert probe.connect_ex(("127.0.0.1", port)) != 0

"""The smoke test: what is served is this model, a wrong one is found, and nothing stays behind."""

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tiny_checkpoint as tiny
import torch
from demo_release import evaluate_record, reference_text
from safetensors.torch import load_file

from requant import deploy, served_copy, serving, smoke
from requant.config import Deploy, Target, Throughput
from requant.engine_client import ask_all
from requant.errors import RequantError
from requant.hashing import file_entry
from requant.packed import PackedCheckpoint, write_decoded
from requant.questions import ask_everything
from requant.records import DeployRecord, ThroughputRecord, read_json, write_json
from requant.reference_text import RECORDED, first_rows
from requant.replay import Served, agreement_of, find_control, replay
from requant.safetensors_io import save
from requant.smoke_texts import Texts, choose_prompts
from requant.streamed import StreamedModel

# A stand-in for the engine where only starting and stopping is tested: it takes the same arguments.
ENGINE = f"""#!{sys.executable}
import http.server, os, signal, sys
signal.signal(signal.SIGTERM, signal.SIG_IGN if BEHAVIOUR == "stubborn" else signal.SIG_DFL)
if BEHAVIOUR == "dies":
    sys.exit("OSError: config.json has no model_type")
class Answers(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(503 if BEHAVIOUR == "sick" else 200)
        self.end_headers()
    def do_POST(self):
        if BEHAVIOUR == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        print("(EngineCore pid=9) ERROR 11-30 12:00:00 [core.py:1] Traceback (most recent call last):")
        print("(EngineCore pid=9) ERROR 11-30 12:00:00 [core.py:1]   File \\"core.py\\", line 1, in step")
        print("(EngineCore pid=9) ERROR 11-30 12:00:00 [core.py:1] ValueError: a head of 96 is not supported")
        print("(APIServer pid=1) RuntimeError: EngineCore encountered an issue. See stack trace.", flush=True)
        if BEHAVIOUR == "crashes":
            os._exit(1)
        self.send_error(500)
server = http.server.HTTPServer(("127.0.0.1", 0), Answers)
print(f"INFO: Uvicorn running on http://127.0.0.1:{{server.server_port}} (Press CTRL+C to quit)", flush=True)
server.serve_forever()
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("deploy")


@pytest.fixture(scope="module")
def source(folder) -> Path:
    return tiny.make_source(folder / "source")


@pytest.fixture(scope="module")
def packed(folder, source) -> Path:
    return tiny.make_packed(source, folder / "packed")


@pytest.fixture(scope="module")
def served(folder, packed) -> list[Served]:
    """Answers of the real engine, serving the decoded weights of `packed`."""
    write_decoded(packed, folder / "decoded")
    tokenizer = PackedCheckpoint(packed).tokenizer()
    prompts = choose_prompts(tokenizer, tiny.heldout(), 8, 16)
    with serving.serve(folder / "decoded", folder / "served.log") as server:
        return ask_all("tiny", server, tokenizer, prompts, 12, 30)


def replayed(served: list[Served], checkpoint: Path) -> list[Served]:
    """Copies of `served`, judged by the chain of `checkpoint`."""
    fresh = [Served(answer.prompt, answer.prompt_ids, answer.steps) for answer in served]
    packed = PackedCheckpoint(checkpoint)
    replay(StreamedModel(packed), packed.tokenizer(), fresh)
    return fresh


def port_is_free(url: str) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", int(url.rsplit(":", 1)[1]))) != 0


def is_running(pid: int) -> bool:
    with contextlib.suppress(ProcessLookupError, FileNotFoundError):
        os.kill(pid, 0)
        return " Z" not in Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1][:3]
    return False


def wait_for(condition, seconds: float = 60) -> bool:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if condition():
            return True
        time.sleep(0.05)
    return False


@pytest.fixture
def stand_in(tmp_path, monkeypatch):
    """Puts an engine of the given behaviour in the place of `transformers serve`."""

    def install(behaviour: str) -> Path:
        path = tmp_path / "transformers"
        path.write_text(ENGINE.replace("BEHAVIOUR", repr(behaviour)))
        path.chmod(0o755)
        monkeypatch.setattr(serving, "_program", lambda *_: str(path))
        return path

    return install


def test_a_release_is_served_and_shown_to_be_itself(tmp_path, source, packed):
    save(
        tmp_path / "tokens.safetensors",
        {"heldout": tiny.heldout(), "heldout_mask": torch.ones(12, 48).byte()},
    )
    write_json(tmp_path / "pack.json", tiny.pack_record(packed))
    text = first_rows(tiny.heldout(), None, RECORDED)
    write_json(tmp_path / "evaluate.json", evaluate_record(reference_text(PackedCheckpoint(packed), text)))
    out = tmp_path / "deploy.json"
    (tmp_path / "deploy.failed.json").write_text("of an earlier run")
    deploy.smoke_test(
        "tiny",
        source,
        packed,
        tmp_path / "pack.json",
        tmp_path / "evaluate.json",
        tmp_path / "tokens.safetensors",
        Deploy(prompts=4, max_tokens=8, throughput=Throughput(concurrency=[2, 1], max_tokens=4, repeats=2)),
        Target(),
        tmp_path / "served",
        tmp_path / "server.log",
        1,
        out,
        tmp_path / "throughput.json",
    )
    record = read_json(out, DeployRecord)
    assert [check.name for check in record.checks] == list(smoke.ALL)
    assert {check.verdict for check in record.checks if check.name not in (smoke.STOP,)} == {"passed"}
    assert not (tmp_path / "deploy.failed.json").exists()
    speed = read_json(tmp_path / "throughput.json", ThroughputRecord)
    assert [(level.concurrency, level.requests) for level in speed.levels] == [(1, 2), (2, 4)]
    assert speed.repeats == 2 and speed.machine["system"] and speed.command == record.command
    for level in speed.levels:
        assert 0 < level.first_token_seconds.lowest <= level.first_token_seconds.median
        assert 0 < level.total_tokens_per_second.median <= level.total_tokens_per_second.highest
    assert record.agreement == 1.0
    assert record.control_agreement < 0.9
    assert record.tokens == sum(answer.tokens for answer in record.answers) >= 4 * 4
    assert record.other_model_status == 400
    assert " ".join(record.command) == "transformers serve {model} --host 127.0.0.1 --port {port} --device cpu"
    assert record.environment == {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    assert record.weights == "decoded to BF16"
    assert record.why_decoded.startswith("transformers has no arithmetic in NVFP4")
    assert any(answer.source_answer_differs for answer in record.answers)
    assert not (tmp_path / "served").exists()


def test_the_reason_for_decoding_fits_the_model():
    dense = served_copy.why_decoded("nvfp4-pack-quantized", False, Target())
    moe = served_copy.why_decoded("nvfp4-pack-quantized", True, Target())
    assert "expert" not in dense and "48371" not in dense
    assert "mixture-of-experts" in moe and "48371" in moe and moe.endswith(dense.removeprefix("transformers "))
    assert served_copy.why_decoded("pack-quantized", True, Target()) is None
    assert served_copy.why_decoded("pack-quantized", True, Target(weights="decoded")) == served_copy.WHY_ASKED
    assert served_copy.why_decoded(None, True, Target(weights="decoded")) is None, "BF16 is decoded already"
    gpu = Target(engine="sglang", device="cuda", gpu="sm120")
    assert served_copy.why_decoded("nvfp4-pack-quantized", True, gpu) is None, "engines on GPUs compute NVFP4"


def test_every_served_token_is_the_chains_own(served, packed):
    answers = replayed(served, packed)
    assert agreement_of(answers) == 1.0
    assert all(answer.ids for answer in answers)
    tokenizer = PackedCheckpoint(packed).tokenizer()
    for answer in answers:
        assert tokenizer.decode(answer.ids).startswith(answer.steps[len(answer.ids) - 1])


@pytest.mark.parametrize("tensor", ["layers.0.self_attn.o_proj", "layers.1.mlp.down_proj", "layers.2.mlp.up_proj"])
def test_one_doubled_global_scale_is_found(tmp_path, served, packed, tensor):
    tensors = load_file(packed / "model.safetensors")
    tensors[f"model.{tensor}.weight_global_scale"] *= 2
    for path in packed.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    save(tmp_path / "model.safetensors", tensors)
    assert agreement_of(replayed(served, tmp_path)) < Deploy().agreement


@pytest.mark.parametrize(
    ("chosen", "agrees", "unread"),
    [
        ("t byte a b", [True, True, True, True], False),
        ("t b a b", [True, False, True], False),  # the byte may be any, so what follows from it is not known
        ("t b b b", [True, False, False], False),
        ("a byte a b", [False, True, True, True], False),
    ],
)
def test_nothing_is_said_of_what_follows_from_bytes_that_nobody_knows(chosen, agrees, unread):
    """An answer of t, a byte that is no character, a, b; `chosen` is what the chain likes best at each place."""
    tokenizer = tiny.tiny_tokenizer()
    ids = {letter: tokenizer(letter, add_special_tokens=False)["input_ids"][0] for letter in "tab"}
    backend = tokenizer.backend_tokenizer
    ids["byte"] = next(id for id in range(len(tokenizer)) if backend.decode([id]) == "\ufffd")

    class Scripted:
        def logits_of(self, tokens, skip_block=None):
            logits = torch.zeros(*tokens.shape, len(tokenizer))
            for place, name in enumerate(chosen.split()):
                if 1 + place < tokens.shape[1] + 1:
                    logits[:, place, ids[name]] = 10
            return logits

    answer = Served("p", [5], ["t", "t", "t\ufffda", "t\ufffdab"])
    replay(Scripted(), tokenizer, [answer])
    assert (answer.agrees, answer.unread, answer.sure) == (agrees, unread, 3)
    foreign = Served("p", [5], ["t", "t\ufffd!!", "t\ufffd!!?"])
    replay(Scripted(), tokenizer, [foreign])
    assert foreign.unread and foreign.agrees[-1:] == [False] and not smoke.own_choice(foreign, 0.5)


def test_another_checkpoint_is_found_and_named(tmp_path, served):
    other = tiny.make_packed(tiny.make_source(tmp_path / "source", seed=1), tmp_path / "packed")
    answers = replayed(served, other)
    agreement = agreement_of(answers)
    assert agreement < 0.5
    check, _, _ = smoke.greedy(answers, smoke.Allowed(0.97), lambda most: pytest.fail("no control is asked for"))
    assert check.verdict == "failed" and f"{agreement:.3f}" in check.found and "0.97" in check.expected


def test_a_packed_file_changed_after_packing_is_named(tmp_path, packed):
    files = {path.name: file_entry(path) for path in packed.iterdir()}
    tensors = load_file(packed / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.weight_global_scale"] *= 2
    save(tmp_path / "model.safetensors", tensors)
    with pytest.raises(RequantError, match=r"model\.safetensors: sha256 .*as packed"):
        served_copy.check_files(tmp_path, {"model.safetensors": files["model.safetensors"]})
    with pytest.raises(RequantError, match=r"config\.json: not there"):
        served_copy.check_files(tmp_path, files)


def test_a_control_that_fits_each_time_is_none(served, packed):
    class Deaf:
        """A chain that says the same whichever block is left out."""

        def __init__(self, blocks: int):
            self.blocks, self.skipped = blocks, []

        def logits_of(self, tokens, skip_block=None):
            self.skipped.append(skip_block)
            return StreamedModel(PackedCheckpoint(packed)).logits_of(tokens)

    deaf, answers = Deaf(3), replayed(served, packed)
    assert find_control("tiny", deaf, answers, 4) == (None, 1.0) and sorted(deaf.skipped) == [0, 1, 2]
    deep = Deaf(61)
    assert find_control("tiny", deep, answers, 4)[0] is None
    assert deep.skipped == [30, 0, 60, 29, 31, 28], "each is a pass through the whole model"
    lacks, agreement = find_control("tiny", StreamedModel(PackedCheckpoint(packed)), answers, 4)
    assert lacks == "without block 1" and agreement < 0.9


def test_prompts_come_back_as_the_tokens_they_were():
    tokenizer = tiny.tiny_tokenizer()
    prompts = choose_prompts(tokenizer, tiny.heldout(), 8, 16)
    rows = [" ".join(map(str, row)) for row in tiny.heldout().tolist()]
    assert len(set(prompts)) == 8
    for prompt in prompts:
        ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
        assert any(" ".join(map(str, ids)) in row for row in rows)


def test_padding_is_no_prompt():
    tokenizer = tiny.tiny_tokenizer()
    ids = tokenizer("the cat sat on a mat")["input_ids"]
    heldout = torch.tensor([ids + [-1] * 20, [-1] * (len(ids) + 20)])
    assert choose_prompts(tokenizer, heldout, 3, 16) == ["the cat sat on"]
    with pytest.raises(RequantError, match="none of 0 documents"):
        choose_prompts(tokenizer, heldout[1:], 3, 16)


def test_sampling_settings_of_the_checkpoint_are_left_out(tmp_path):
    path = tmp_path / "generation_config.json"
    path.write_text('{"do_sample": true, "repetition_penalty": 1.3, "eos_token_id": [1]}')
    served_copy.make_greedy(tmp_path)
    assert path.read_text() == '{"eos_token_id": [1]}'


def test_a_killed_jobs_folder_is_emptied_first(tmp_path):
    (tmp_path / "served").mkdir()
    (tmp_path / "served" / "half").write_text("x")
    with served_copy.temporary_folder(tmp_path / "served") as folder:
        assert list(folder.iterdir()) == []
    assert not folder.exists()


def test_an_engine_that_cannot_load_is_one_line_with_its_reason(tmp_path):
    (tmp_path / "nothing").mkdir()
    with pytest.raises(RequantError) as raised, serving.serve(tmp_path / "nothing", tmp_path / "log"):
        pass
    message = str(raised.value)
    assert str(tmp_path / "log") in message and "\n" not in message
    assert "config.json" in message or "nothing" in message.split("served:")[1]
    assert " | " not in message, "its error, not its last lines"


def test_an_engine_that_dies_at_once_is_one_line_with_its_last_word(tmp_path, stand_in):
    stand_in("dies")
    with (
        pytest.raises(RequantError, match="status 1 before it served: OSError: config.json has no model_type"),
        serving.serve(tmp_path, tmp_path / "log"),
    ):
        pass


def test_an_engine_that_never_gets_healthy_is_stopped(tmp_path, stand_in):
    stand_in("sick")
    with (
        pytest.raises(RequantError, match="no answer to /health after 2 s: ") as raised,
        serving.serve(tmp_path, tmp_path / "log", Target(startup_seconds=2)),
    ):
        pass
    assert "startup_seconds" in str(raised.value) and "\n" not in str(raised.value)
    for url in re.findall(r"http://127\.0\.0\.1:\d+", (tmp_path / "log").read_text()):
        assert port_is_free(url)


@pytest.mark.parametrize(
    ("behaviour", "became"),
    [
        ("crashes", "the engine ended with status 1: ValueError: a head of 96 is not supported ({log})"),
        ("fails", "{log}: ValueError: a head of 96 is not supported"),
        ("killed", "the engine was ended by SIGKILL: INFO: Uvicorn running on "),
    ],
)
def test_an_engine_that_fails_while_it_is_asked_is_told_by_its_own_error(
    tmp_path, stand_in, monkeypatch, behaviour, became
):
    stand_in(behaviour)
    monkeypatch.setattr(serving, "END_SECONDS", 1.0 if behaviour == "fails" else 60.0)
    tokenizer, log = tiny.tiny_tokenizer(), tmp_path / "log"
    with serving.serve(tmp_path, log) as server:
        assert server.how_ended() is None
        with pytest.raises(RequantError) as raised:
            ask_all("tiny", server, tokenizer, ["the cat"], 4, 30)
    assert became.format(log=log) in str(raised.value) and "\n" not in str(raised.value)
    with serving.serve(tmp_path, log) as server:
        texts = Texts(
            prompts=["the cat"], speed_prompts=["the cat"], long=["the cat"], too_long="a b", context=2, rows=[]
        )
        settings = Deploy(throughput=Throughput(concurrency=[1], repeats=1))
        asked = ask_everything("tiny", server, tokenizer, texts, settings, Target())
    assert became.format(log=log) in asked.engine_error
    line = smoke.failure_line(
        "tiny", [smoke.failed(smoke.GARBLE, "Connection error.", "an answer")], asked.engine_error
    )
    assert line.endswith(f"; {asked.engine_error}")
    assert became.format(log=log) in str(asked.levels_error)


@pytest.mark.parametrize("behaviour", ["healthy", "stubborn"])
def test_nothing_is_left_after_an_exception(tmp_path, stand_in, monkeypatch, behaviour):
    stand_in(behaviour)
    monkeypatch.setattr(serving, "STOP_SECONDS", 0.5)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with pytest.raises(ZeroDivisionError), serving.serve(tmp_path, tmp_path / "log") as server:
        assert is_running(server.pid) and not port_is_free(server.url)
        assert list(tmp_path.glob("requant-engine-*"))
        raise ZeroDivisionError
    assert not is_running(server.pid) and port_is_free(server.url)
    assert not list(tmp_path.glob("requant-engine-*"))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_nothing_is_left_after_the_job_is_ended(tmp_path, stand_in, number):
    engine = stand_in("healthy")
    program = f"""
import signal, tempfile, time
from requant import served_copy, serving
signal.signal(signal.SIGINT, signal.default_int_handler)  # shells let background jobs ignore it
serving._program = lambda *_: {str(engine)!r}
tempfile.tempdir = {str(tmp_path)!r}
with serving.unwinding_on_sigterm(), served_copy.temporary_folder({str(tmp_path / "served")!r}):
    with serving.serve({str(tmp_path)!r}, {str(tmp_path / "log")!r}) as server:
        print(server.pid, server.url, flush=True)
        time.sleep(60)
"""
    source = str(Path(serving.__file__).parents[1])
    environment = {**os.environ, "PYTHONPATH": source}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    job = subprocess.Popen([sys.executable, "-c", program], env=environment, **pipes)
    pid, url = job.stdout.readline().split()
    assert is_running(int(pid)) and (tmp_path / "served").exists()
    job.send_signal(number)
    try:
        job.communicate(timeout=60)
    finally:
        job.kill()
    assert job.returncode not in (0, None)
    assert wait_for(lambda: not is_running(int(pid)) and port_is_free(url))
    if number != signal.SIGKILL:  # no process can tidy up after that; the next run does
        assert not (tmp_path / "served").exists() and not list(tmp_path.glob("requant-engine-*"))


def test_the_engine_sees_no_credentials_and_no_cache(tmp_path, stand_in, monkeypatch):
    stand_in("healthy")
    for name in (
        "HF_TOKEN",
        "OPENAI_API_KEY",
        "HUGGING_FACE_HUB_TOKEN",
        "AWS_SECRET_ACCESS_KEY",
        "DB_PASSWORD",
    ):
        monkeypatch.setenv(name, "hush-hush")
    with serving.serve(tmp_path, tmp_path / "log", threads=2) as server:
        lines = Path(f"/proc/{server.pid}/environ").read_bytes().decode().split("\0")
    seen = dict(line.split("=", 1) for line in lines if line)
    assert "hush-hush" not in seen.values()
    assert seen["HF_HUB_OFFLINE"] == "1" and seen["OMP_NUM_THREADS"] == "2"
    assert "requant-engine-" in seen["HF_HOME"] and seen["HF_HUB_CACHE"].startswith(seen["HF_HOME"])


def test_only_what_was_packed_is_laid_out(tmp_path):
    packed = tmp_path / "packed"
    (packed / ".eval_results").mkdir(parents=True)
    for name in ("config.json", "model-00001-of-00001.safetensors", "README.md", ".README.md.7.partial"):
        (packed / name).write_text(name)
    served_copy.mirror(packed, ["config.json", "model-00001-of-00001.safetensors"], tmp_path / "served")
    assert sorted(path.name for path in (tmp_path / "served").iterdir()) == [
        "config.json",
        "model-00001-of-00001.safetensors",
    ]

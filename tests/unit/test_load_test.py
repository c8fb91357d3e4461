"""The load test: the first blocks are served and shown to be themselves; an engine that reads them wrong is found."""

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import tiny
import torch
from test_verify import make_release

from requant import gate
from requant.checkpoint import Checkpoint
from requant.config import Deploy, Target
from requant.errors import RequantError
from requant.load_test import Cut, load_test
from requant.packed import PackedCheckpoint
from requant.records import LoadTestRecord, read_json
from requant.safetensors_io import save
from requant.streamed import StreamedModel

SETTINGS = Deploy(prompts=4, prompt_tokens=12, max_tokens=6)


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """The directory of an NVFP4 release of three blocks, the first of them dense; tokens of text beside it."""
    folder = tmp_path_factory.mktemp("release") / "r"
    source = tiny.write_checkpoint(folder.parent / "source", "deepseek_v3")
    make_release(folder, source, "NVFP4")
    rows = [Checkpoint(source).tokenizer()(text)["input_ids"][:16] for text in tiny.sentences(4, seed=3)]
    heldout = torch.tensor(rows, dtype=torch.int32)
    save(folder.parent / "t.safetensors", {"heldout": heldout, "heldout_mask": torch.ones_like(heldout).byte()})
    return folder


def run_test(made: Path, folder: Path, blocks: int = 2, target: Target | None = None, **changes) -> LoadTestRecord:
    """The load test of the release's first `blocks` blocks, in `folder`."""
    settings = {"release": "r", "source": made.parent / "source", "scheme": "NVFP4", "blocks_dir": made / "blocks"}
    return load_test(
        Cut(**settings | {"blocks": blocks} | changes),
        made.parent / "t.safetensors",
        SETTINGS,
        target or Target(),
        folder / "load_test",
        folder / "engine.log",
        1,
        folder / "load_test.json",
    )


@contextlib.contextmanager
def refused(folder: Path, line: str) -> Iterator[None]:
    """The test fails with that line, leaves nothing but its log, and ends further blocks."""
    with pytest.raises(RequantError) as raised:
        yield
    message = str(raised.value)
    assert line in message and "\n" not in message
    assert message.startswith("r: load test of blocks 0 to 1: ")
    assert message.endswith(
        "; the blocks made so far stay: mend that, or choose another deploy.target, and the same command goes on"
    )
    assert "load_test_blocks" not in message
    assert {path.name for path in folder.iterdir()} <= {"engine.log", gate.FAILURE}
    with pytest.raises(RequantError) as stopped:
        gate.check_open(folder)
    assert str(stopped.value) == f"{folder.name}: no further blocks: {message.removeprefix('r: ')}"


def test_the_first_blocks_are_served_and_shown_to_be_themselves(made, tmp_path):
    record = run_test(made, tmp_path)
    assert record == read_json(tmp_path / "load_test.json", LoadTestRecord)
    assert (record.blocks, record.moe_blocks, record.verdict) == (2, 1, "passed")
    assert record.agreement == 1.0 > record.agreement_limit > record.control_agreement
    assert record.control.startswith("without block ")
    assert record.tokens == sum(answer.tokens for answer in record.answers) > 4 and len(record.answers) == 4
    assert record.agreement_least < record.agreement and record.arithmetic.rounds == "none"
    assert record.other_model_status == 400
    assert " ".join(record.command).startswith("transformers serve {model} ")
    assert record.weights == "decoded to BF16" and "48371" in record.why_decoded
    assert sorted(path.name for path in tmp_path.iterdir()) == ["engine.log", "load_test.json"]
    gate.check_open(tmp_path)


def test_an_engine_that_forgets_the_global_scale_of_experts_is_found(made, tmp_path, monkeypatch):
    """transformers reads such checkpoints wrong without a word, and answers: which is why they are decoded for it."""
    monkeypatch.setattr("requant.load_test.why_decoded", lambda *_: None)
    with refused(tmp_path, "of the tokens or more are this checkpoint's own choice"):
        run_test(made, tmp_path)
    assert "running on http://127.0.0.1" in (tmp_path / "engine.log").read_text(), "it loaded and served"


def test_an_engine_that_does_not_start_is_one_line(made, tmp_path):
    with refused(tmp_path, f"{tmp_path / 'engine.log'}: no answer to /health after 1 s"):
        run_test(made, tmp_path, target=Target(startup_seconds=1))


def test_a_damaged_block_is_named_before_an_engine_starts(made, tmp_path):
    blocks = tmp_path.parent / f"{tmp_path.name}.blocks"
    shutil.copytree(made / "blocks", blocks)
    path = blocks / "1.safetensors"
    raw = bytearray(path.read_bytes())
    raw[-1] ^= 1
    path.write_bytes(raw)
    with refused(tmp_path, str(path)):
        run_test(made, tmp_path, blocks_dir=blocks)
    assert not (tmp_path / "engine.log").exists()


def test_an_error_that_nobody_thought_of_ends_further_blocks_too(made, tmp_path, monkeypatch):
    def broken(*_):
        raise ZeroDivisionError("of the\nengine's")

    monkeypatch.setattr("requant.load_test.serve_at", broken)
    with refused(tmp_path, "ZeroDivisionError: of the engine's"):
        run_test(made, tmp_path)


def test_the_next_build_begins_with_an_open_gate(tmp_path):
    for release in ("a", "b"):
        gate.close(tmp_path / release, "why")
    with pytest.raises(RequantError, match="a: no further blocks: why"):
        gate.check_open(tmp_path / "a")
    gate.open_again(tmp_path)
    gate.check_open(tmp_path / "a")
    gate.check_open(tmp_path / "b")


def test_activations_are_rounded_for_an_engine_that_computes_in_the_format(made):
    checkpoint = PackedCheckpoint(made / "model")
    tokens = torch.randint(3, 320, (2, 12), generator=torch.Generator().manual_seed(0))
    models = [StreamedModel(checkpoint, quantize_activations=rounds) for rounds in (False, True)]
    plain, rounded = (model.logits_of(tokens, skip_block=0) for model in models)
    assert not torch.equal(plain, rounded)
    assert torch.equal(rounded, models[0].logits_of(tokens, quantize_activations=True, skip_block=0))

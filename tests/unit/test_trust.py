"""Code that comes with a checkpoint is never run, and nothing asks whether it may: whoever opens it says no."""

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import tiny

ROOT = Path(__file__).resolve().parents[2]
CODE = "open({marker!r}, 'w').close()\nfrom transformers import PreTrainedTokenizerFast as Own, LlamaConfig as Config\n"
OPENED = """
import sys
from pathlib import Path
from types import SimpleNamespace
from requant.blocks import empty_model
from requant.checkpoint import Checkpoint
from requant.config import Target
from requant.served_benchmark import Subject, _check_chat
from requant.served_model import client

folder = Path(sys.argv[1])
checkpoint = Checkpoint(folder)
server = SimpleNamespace(url="http://127.0.0.1:9", model="m")
for action in (
    lambda: empty_model(checkpoint.config),
    checkpoint.tokenizer,
    lambda: client(server, folder, Target(), False, 1, 64, None),
    lambda: _check_chat("x", Subject("x", folder, {}), folder),
):
    try:
        action()
        print("opened")
    except Exception as error:
        print(type(error).__name__, str(error).splitlines()[0])
"""


@pytest.fixture(scope="module")
def hostile(tmp_path_factory):
    """A checkpoint that names code of its own for its config, its model and its tokenizer, and what that would leave.

    Only as its `tokenizer_class` says is there a tokenizer that transformers knows.
    """
    folder = tiny.write_checkpoint(tmp_path_factory.mktemp("hostile") / "model", "llama")
    marker = folder.parent / "ran"
    (folder / "own.py").write_text(CODE.format(marker=str(marker)))
    tiny.edit_config(folder, auto_map={"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Own"})
    path = folder / "tokenizer_config.json"

    def naming(known: bool) -> Path:
        settings = json.loads(path.read_text()) | {"auto_map": {"AutoTokenizer": ["own.Own", "own.Own"]}}
        settings["tokenizer_class"] = "PreTrainedTokenizerFast" if known else "OwnTokenizer"
        path.write_text(json.dumps(settings))
        return folder

    return naming, marker


@pytest.mark.parametrize("known", [True, False])
def test_code_of_a_checkpoint_is_neither_run_nor_asked_for(hostile, known):
    """On a terminal where nobody answers: the pipe stays open, and nothing comes."""
    naming, marker = hostile
    asked, never_answered = os.pipe()
    environment = os.environ | {"PYTHONPATH": str(ROOT / "src"), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", textwrap.dedent(OPENED), str(naming(known))]
    done = subprocess.run(command, stdin=asked, capture_output=True, text=True, env=environment, timeout=100)
    for end in (asked, never_answered):
        os.close(end)
    opened, tokenizer, client, chat = done.stdout.splitlines()
    assert opened == "opened" and "[y/N]" not in done.stdout + done.stderr, done.stderr
    if known:
        assert (tokenizer, client) == ("opened", "opened") and chat.startswith("RequantError"), "no chat template"
    else:
        assert tokenizer == "opened", "tokenizer.json says all of it: the class is not needed"
        assert client.startswith("ValueError") and chat.startswith("ValueError")
    assert not marker.exists()

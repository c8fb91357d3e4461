"""A model as makers publish them, with much at once that transformers would not save so, built to its card."""

import json
import shutil

import pytest
import tiny
import torch
import yaml
from building import BRIEF, TASK, Build
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from requant.checkpoint import INDEX, Checkpoint
from requant.records import DeployRecord, PackRecord, SourceRecord, VerifyRecord, read_json
from requant.tokenizer import tokenizer_of

FOLDER, RELEASE = "models/kimi", "kimi-w4"
BUFFER, TOWER = "model.layers.0.self_attn.rotary_emb.inv_freq", "vision_tower.patch_embed.weight"
NORM = "model.layers.0.input_layernorm.weight"


def write_model(build: Build) -> None:
    """Kimi-K2 with its maker's tokenizer, licences and code beside it, no class named and an extra layer counted that
    is not stored; norms in F32, a persisted buffer, a tensor of no module, and safetensors that nothing names."""
    folder = build.directory / FOLDER
    tiny.write_checkpoint(folder, "kimi_k2", seed=7, num_hidden_layers=1, first_k_dense_replace=0, shard_size="1MB")
    (folder / "tokenizer.json").unlink()
    shutil.copy(build.directory / "tiktoken.model", folder)
    added = {"259": {"content": "[BOS]", "special": True}, "260": {"content": "[EOS]", "special": True}}
    config = {"tokenizer_class": "TikTokenTokenizer", "bos_token": "[BOS]", "eos_token": "[EOS]"}
    config |= {"auto_map": {"AutoTokenizer": ["tokenization_kimi.TikTokenTokenizer", None]}}
    (folder / "tokenizer_config.json").write_text(json.dumps(config | {"added_tokens_decoder": added}))
    (folder / "tokenization_kimi.py").write_text("raise SystemExit('code of a checkpoint was run')\n")
    tiny.add_beside(folder)
    tiny.edit_config(folder, architectures=None, num_nextn_predict_layers=1)
    index = json.loads((folder / INDEX).read_text())
    shard = index["weight_map"][NORM]
    tensors = {n: t.float() * 1.001 if "norm" in n else t for n, t in load_file(folder / shard).items()}
    strange = {BUFFER: torch.ones(16), TOWER: torch.zeros(4, 4)}
    save_file(tensors | strange, folder / shard, metadata={"format": "pt"})
    index["weight_map"] |= dict.fromkeys(strange, shard)
    (folder / INDEX).write_text(json.dumps(index))
    save_file({"layers.0.wq": torch.zeros(2)}, folder / "consolidated.safetensors")


@pytest.fixture(scope="module")
def build(tmp_path_factory) -> Build:
    """The model, and the config of its release."""
    import base64

    build = Build(tmp_path_factory.mktemp("published"))
    ranks = [bytes([value]) for value in range(256)] + [b"th", b"the", b" t"]
    lines = "".join(f"{base64.b64encode(token).decode()} {rank}\n" for rank, token in enumerate(ranks))
    (build.directory / "tiktoken.model").write_text(lines)
    write_model(build)
    tiny.write_text(build.directory / "text.txt", 100, 1)
    (build.directory / "tasks").mkdir()
    (build.directory / "tasks/tiny.yaml").write_text(TASK)
    (build.directory / "tasks/rows.jsonl").write_text('{"question": "the cat sat on", "answer": "the mat"}\n' * 2)
    small = {"sources": [{"path": "text.txt"}], "nsamples": 8, "seqlen": 32, "heldout": {"nsamples": 4}}
    release = {
        "model": "kimi",
        "scheme": "W4A16",
        "calibration": "small",
        "benchmark": "tiny",
        "tuning": {"iters": 0},
        "deploy": {"prompts": 2, "prompt_tokens": 8, "max_tokens": 4, "throughput": BRIEF},
    }
    config = {
        "models": {"kimi": {"path": FOLDER}},
        "calibrations": {"small": small},
        "benchmarks": {"tiny": {"tasks": ["tiny"], "include_path": "tasks", "batch_size": 4}},
        "releases": {RELEASE: release},
        "build": [RELEASE],
    }
    (build.directory / "mine.yaml").write_text(yaml.safe_dump(config))
    return build


@pytest.fixture(scope="module")
def said(build) -> str:
    """What the build said."""
    done = build.run("model_card.md")
    return done.stdout + done.stderr


def test_it_is_built_served_and_described(build, said):
    results = build.directory / "results"
    deploy = read_json(results / RELEASE / "deploy.json", DeployRecord)
    assert deploy.verdict == "passed" and deploy.agreement >= deploy.agreement_limit
    verify = read_json(results / RELEASE / "verify.json", VerifyRecord)
    assert verify.unchanged + len(verify.tensors) == verify.source_tensors
    pack = read_json(results / RELEASE / "pack.json", PackRecord)
    assert pack.multi_token_prediction == "none" and pack.tokenizer_from == "tiktoken.model"
    assert pack.tensors_left_out.keys() == {BUFFER, TOWER}
    assert tiny.BESIDE.keys() <= pack.files.keys()
    source = read_json(results / "source/kimi/source.json", SourceRecord)
    behind = ["README.md", "consolidated.safetensors", "figures/", "tokenization_kimi.py", "tool_parser.py"]
    assert source.files_left_behind == behind
    assert source.tensors_left_out == pack.tensors_left_out and source.architecture == "DeepseekV3ForCausalLM"


def test_the_release_says_what_it_is_and_has_the_sources_bytes(build, said):
    model = build.directory / "results" / RELEASE / "model"
    config = json.loads((model / "config.json").read_text())
    assert config["architectures"] == ["DeepseekV3ForCausalLM"] and config["model_type"] == "deepseek_v3"
    assert config["num_nextn_predict_layers"] == 0 and config["torch_dtype"] == config["dtype"] == "bfloat16"
    assert (config["scoring_func"], config["topk_method"]) == ("sigmoid", "noaux_tc")
    for name, text in tiny.BESIDE.items():
        assert (model / name).read_text() == text
    assert not list(model.rglob("*.py")) and "auto_map" not in (model / "tokenizer_config.json").read_text()
    source, released = (Checkpoint(folder).read([NORM])[NORM] for folder in (build.directory / FOLDER, model))
    assert released.dtype == torch.float32 and torch.equal(source, released)
    own, theirs = tokenizer_of(Checkpoint(build.directory / FOLDER)), AutoTokenizer.from_pretrained(model)
    assert own("the cat. don't 123")["input_ids"] == theirs("the cat. don't 123")["input_ids"]
    sums = (model / "SHA256SUMS").read_text()
    assert "  additional_chat_templates/tool_use.jinja\n" in sums


def test_what_stays_behind_is_told_once_at_planning_in_the_job_and_on_the_card(build, said):
    warned = [line for line in said.splitlines() if line.startswith("warning: ")]
    assert len([line for line in warned if "consolidated.safetensors: not read" in line]) == 1
    assert (
        len([line for line in warned if f"no module of the model has are left out, the first is {TOWER}" in line]) == 1
    )
    assert "kimi: not carried along: README.md, consolidated.safetensors, figures/, tokenization_kimi.py" in said
    card = (build.directory / "model_card.md").read_text()
    assert "Not carried along: `README.md`, `consolidated.safetensors`, `figures/`" in card
    readme = (build.directory / "results" / RELEASE / "model/README.md").read_text()
    for text in (card, readme):
        assert f"1 `{TOWER.removesuffix('.weight')}` (no module of the model has it)" in text
        assert "1 `model.layers.*.self_attn.rotary_emb.inv_freq` (a buffer that the model computes" in text
        assert "`tokenizer.json` was converted from the source's `tiktoken.model`" in text
    assert "Not carried along" not in readme, "what lies beside a source is no matter of its release"


def test_a_changed_licence_is_packed_anew_and_nothing_else_is_made_again(build, said):
    assert build.planned("model_card.md") == {}
    template = build.directory / FOLDER / "additional_chat_templates/tool_use.jinja"
    template.write_text("another template")
    assert build.planned("results/kimi-w4/pack.json") == {"source_file": 1, "source": 1, "pack": 1}
    template.write_text(tiny.BESIDE["additional_chat_templates/tool_use.jinja"])
    assert build.planned("model_card.md") == {}, "it is as it was checked, whatever its time says"


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"architectures": ["DeepseekV3ForSequenceClassification"]}, "architectures: 'DeepseekV3ForSequenceClassi"),
        ({"scoring_func": "softmax"}, "scoring_func: 'softmax'; expected 'sigmoid'"),
        ({"topk_method": "greedy"}, "topk_method: 'greedy'; expected 'noaux_tc'"),
    ],
)
def test_what_is_not_computed_so_is_refused_when_planned(build, tmp_path, changes, line):
    copy = Build(tmp_path)
    for name in ("mine.yaml", "text.txt", "tasks", "models"):
        place = build.directory / name
        (shutil.copytree if place.is_dir() else shutil.copy)(place, tmp_path / name)
    tiny.edit_config(tmp_path / FOLDER, **changes)
    done = copy.run("-n", check=False)
    (error,) = [found for found in done.stderr.splitlines() if found.startswith("error: ")]
    assert done.returncode != 0 and error.startswith(f"error: {FOLDER}: config.json: {line}")

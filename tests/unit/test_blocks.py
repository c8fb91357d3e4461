"""A block built by requant gives what the same block gives inside the whole transformers model."""

import json
import shutil

import pytest
import tiny
import torch
from transformers import AutoModelForCausalLM

from requant.architecture import fused_groups
from requant.checkpoint import Checkpoint
from requant.errors import RequantError
from requant.routing import observe
from requant.streamed import StreamedModel

STACKED = ("deepseek_v32", "mixtral", "qwen3_moe")


@pytest.fixture(scope="module", params=[*tiny.FAMILIES, *(f"{family} stacked" for family in STACKED)])
def source(request, tmp_path_factory):
    family, _, stacked = request.param.partition(" ")
    return tiny.write_checkpoint(tmp_path_factory.mktemp("blocks") / family, family, stacked=bool(stacked))


@pytest.fixture(scope="module")
def tokens():
    return torch.randint(3, 320, (3, 40), generator=torch.Generator().manual_seed(1))


def whole(source):
    """The transformers model. Kimi-K2's files name code that transformers has under the name of DeepSeek-V3."""
    config = json.loads((source / "config.json").read_text())
    if config["model_type"] == "kimi_k2":
        source = shutil.copytree(source, source.with_name("deepseek"), dirs_exist_ok=True)
        tiny.edit_config(source, model_type="deepseek_v3", auto_map={})
    return AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16, experts_implementation="eager").eval()


@torch.no_grad()
def test_every_block_gives_the_whole_models_hidden_states(source, tokens):
    model = whole(source)
    layers = []
    hooks = [layer.register_forward_hook(lambda m, i, out: layers.append(out)) for layer in model.model.layers]
    logits = model(tokens).logits.float()
    for hook in hooks:
        hook.remove()
    streamed = StreamedModel(Checkpoint(source))
    embedded, *states = streamed.stream(tokens)
    assert torch.equal(embedded, model.model.embed_tokens(tokens))
    for ours, theirs in zip(states, layers, strict=True):
        error = (ours.float() - theirs.float()).abs().max() / theirs.float().abs().max()
        assert error < 0.02, "the same up to the order of BF16 sums"
    assert (streamed.head()(states[-1]) - logits).abs().max() / logits.abs().max() < 0.03


@torch.no_grad()
def test_the_assembled_model_is_the_streamed_one(source, tokens):
    streamed = StreamedModel(Checkpoint(source))
    assert torch.equal(streamed.whole()(tokens).logits.float(), streamed.logits_of(tokens))


@torch.no_grad()
def test_a_block_chooses_its_keys_where_it_does_not_see_all(tmp_path, tokens):
    """DeepSeek-V3.2 over more tokens than its indexer chooses: the whole model's choice, and not all keys."""
    source = tiny.write_checkpoint(tmp_path / "few", "deepseek_v32", index_topk=8, num_hidden_layers=1)
    sparse = StreamedModel(Checkpoint(source))
    found, wanted = sparse.logits_of(tokens), whole(source)(tokens).logits.float()
    assert (found - wanted).abs().max() < 0.03 * wanted.abs().max()
    tiny.edit_config(source, index_topk=2048)
    dense = StreamedModel(Checkpoint(source)).logits_of(tokens)
    assert torch.equal(found[:, :8], dense[:, :8])
    assert (found - dense)[:, 8:].abs().max() > 0.1 * wanted.abs().max()


def test_samples_longer_than_a_sliding_window_are_refused(tmp_path, tokens):
    source = tiny.write_checkpoint(tmp_path / "window", "mixtral", num_hidden_layers=1, sliding_window=32)
    with pytest.raises(RequantError, match="sliding_window: 32; samples have 40 tokens"):
        StreamedModel(Checkpoint(source)).logits_of(tokens)


def test_padding_changes_nothing_and_is_not_counted(source, tokens):
    streamed = StreamedModel(Checkpoint(source))
    block, hidden = streamed.block(1), streamed.embed(tokens)
    mask = torch.ones(3, 40, dtype=torch.uint8)
    mask[:, 25:] = 0
    cut, full = observe(streamed, block, hidden[:, :25], None, 1), observe(streamed, block, hidden, mask)
    assert torch.equal(full.output[:, :25], cut.output)
    assert not full.output[:, 25:].any()
    assert full.tokens_per_expert == cut.tokens_per_expert
    assert full.input_amax == cut.input_amax


def test_expert_hits_are_the_routers_choices(tmp_path, tokens):
    source = tiny.write_checkpoint(tmp_path / "moe", "deepseek_v3")
    streamed = StreamedModel(Checkpoint(source))
    hidden = streamed.embed(tokens)
    seen = observe(streamed, streamed.block(1), hidden, None)
    chosen = []
    model = whole(source)
    layer = model.model.layers[1]
    layer.mlp.gate.register_forward_hook(lambda m, i, out: chosen.append(out[2]))
    with torch.no_grad():
        layer(hidden, position_embeddings=streamed.positions(40))
    expected = torch.bincount(torch.cat(chosen).flatten(), minlength=8).tolist()
    assert seen.tokens_per_expert == expected
    assert sum(expected) == tokens.numel() * 2


def test_a_block_with_a_missing_tensor_or_a_wrong_shape_is_refused(tmp_path):
    source = tiny.write_checkpoint(tmp_path / "moe", "qwen3_moe")
    broken = Checkpoint(source)
    del broken.index["model.layers.1.mlp.experts.3.up_proj.weight"]
    with pytest.raises(RequantError, match=r"block 1: 1 tensors missing .* 'mlp.experts.3.up_proj.weight'"):
        StreamedModel(broken).block(1)
    wider = Checkpoint(source)
    wider.config["moe_intermediate_size"] = 256
    with pytest.raises(
        RequantError, match=r"down_proj.weight: shape \[128, 128\] found; config.json gives \[128, 256\]"
    ):
        StreamedModel(wider).block(1)


def test_fused_groups_are_those_of_the_engines():
    names = [
        f"model.layers.0.self_attn.{part}.weight" for part in ("q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "o_proj")
    ]
    names += [f"model.layers.0.mlp.experts.{e}.{part}_proj.weight" for e in (0, 1) for part in ("gate", "up", "down")]
    groups = fused_groups(names)
    assert [[name.removeprefix("model.layers.0.") for name in group] for group in groups] == [
        ["mlp.experts.0.gate_proj.weight", "mlp.experts.0.up_proj.weight"],
        ["mlp.experts.1.gate_proj.weight", "mlp.experts.1.up_proj.weight"],
        ["self_attn.kv_a_proj_with_mqa.weight", "self_attn.q_a_proj.weight"],
    ]
    assert fused_groups(["a.q_proj.weight", "a.k_proj.weight", "a.v_proj.weight"]) == [
        ["a.k_proj.weight", "a.q_proj.weight", "a.v_proj.weight"]
    ]

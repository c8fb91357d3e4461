"""Evaluation against an independent computation: whole transformers models, plain sums."""

import math

import pytest
import tiny
import torch
from safetensors.torch import load_file
from test_verify import make_release
from transformers import AutoModelForCausalLM

from requant.checkpoint import Checkpoint
from requant.evaluate import Tally, evaluate
from requant.packed import write_decoded
from requant.records import CalibrationRecord, TokenSetRecord, write_json
from requant.safetensors_io import save
from requant.streamed import StreamedModel


@pytest.fixture(scope="module", params=["NVFP4", "W3A16"])
def case(request, tmp_path_factory):
    """A plainly rounded release of a tiny MoE, its held-out tokens and its reference chain."""
    folder = tmp_path_factory.mktemp("evaluate")
    source = tiny.write_checkpoint(folder / "moe", "deepseek_v3", num_hidden_layers=2)
    make_release(folder, source, request.param)
    tokens = load_file(folder / "t.safetensors")
    hidden = []
    for number, state in enumerate(StreamedModel(Checkpoint(source)).stream(tokens["heldout"])):
        hidden.append(folder / f"chain_{number}.safetensors")
        save(hidden[-1], {"heldout": state})
    empty = TokenSetRecord(samples=4, tokens=64, sha256="the hash", sources=[])
    record = CalibrationRecord(
        model="m",
        calibration="c",
        tokenizer_sha256="t",
        seqlen=16,
        pack="concat",
        seed=1,
        calibration_set=empty,
        heldout_set=empty,
        seconds=0.0,
    )
    write_json(folder / "calibration.json", record)
    return request.param, folder, source, hidden


def run(case, tokens="t.safetensors"):
    _, folder, source, hidden = case
    return evaluate(
        source, folder / "model", folder / tokens, folder / "calibration.json", hidden, "r", "m", 1, folder / "e.json"
    )


def test_figures_are_those_of_whole_models(case, tmp_path):
    scheme, folder, source, _ = case
    record = run(case)
    tokens = load_file(folder / "t.safetensors")["heldout"].long()
    write_decoded(folder / "model", tmp_path / "decoded")
    logits = {}
    for name, path in (("source", source), ("release", tmp_path / "decoded")):
        model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16, experts_implementation="eager").eval()
        with torch.no_grad():
            logits[name] = model(tokens).logits[:, :-1].double().log_softmax(-1)
    loss = -logits["source"].gather(-1, tokens[:, 1:, None]).mean()
    assert record.source.perplexity == pytest.approx(math.exp(loss), rel=0.01)
    assert record.tokens == 4 * 15 and record.heldout_sha256 == "the hash"
    if scheme == "W3A16":  # NVFP4 rounds activations too, which a decoded checkpoint does not
        kl = (logits["source"].exp() * (logits["source"] - logits["release"])).sum(-1).mean()
        assert record.quantized.kl_divergence == pytest.approx(float(kl), rel=0.1)
        assert record.activations == "BF16"
    else:
        assert record.activations.startswith("rounded to NVFP4")


def test_blocks_are_counted_from_0_as_their_files_are(case, capsys):
    run(case)
    lines = [line for line in capsys.readouterr().err.splitlines() if " evaluated" in line]
    assert len(lines) == 2 and "r: block 0 (of 2) " in lines[0] and "r: block 1 (of 2) " in lines[1]


def test_plain_rounding_is_iteration_0(case):
    """The release of this test was rounded plainly, so both columns are one model."""
    record = run(case)
    assert record.rounded == record.quantized
    assert record.block_mse[-1]["rounded"] > record.block_mse[0]["rounded"] > 0


def test_the_source_has_no_divergence_from_itself(case):
    record = run(case)
    assert record.source.kl_divergence == 0 and record.source.top1_agreement == 1


def test_padding_is_no_prediction(case):
    _, folder, _, _ = case
    tokens = load_file(folder / "t.safetensors")
    tokens["heldout_mask"][1:, 10:] = 0
    save(folder / "padded.safetensors", tokens)
    assert run(case, "padded.safetensors").tokens == 15 + 3 * 9


def test_sums_by_hand():
    tally = Tally()
    source = torch.log(torch.tensor([[0.5, 0.25, 0.25], [0.2, 0.2, 0.6]]))
    ours = torch.log(torch.tensor([[0.25, 0.5, 0.25], [0.1, 0.1, 0.8]]))
    tally.add(ours, source, torch.tensor([0, 2]))
    quality = tally.quality()
    first = 0.5 * math.log(2) + 0.25 * math.log(0.5)
    second = 0.4 * math.log(2) + 0.6 * math.log(0.75)
    assert quality.kl_divergence == pytest.approx((first + second) / 2, rel=1e-6)
    assert quality.perplexity == pytest.approx(math.exp(-(math.log(0.25) + math.log(0.8)) / 2), rel=1e-6)
    assert quality.top1_agreement == 0.5
    spread = ((first - (first + second) / 2) ** 2 + (second - (first + second) / 2) ** 2) / 2
    assert quality.kl_divergence_stderr == pytest.approx(math.sqrt(spread / 2), rel=1e-5)

"""Evaluation against an independent computation: whole transformers models, plain sums."""

import math
import random
import statistics

import pytest
import tiny
import torch
from safetensors.torch import load_file
from test_verify import make_release
from transformers import AutoModelForCausalLM

from requant.checkpoint import Checkpoint
from requant.errors import RequantError
from requant.evaluate import Chain, Tally, evaluate, evaluate_pruned, kl_change
from requant.packed import write_decoded
from requant.records import CalibrationRecord, KeepList, KlChange, ModelQuality, TokenSetRecord, write_json
from requant.safetensors_io import save
from requant.streamed import StreamedModel


def write_calibration(path) -> None:
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
    write_json(path, record)


def chain_of(source, tokens: torch.Tensor, folder) -> list:
    """Files of the reference chain over held-out `tokens`."""
    files = []
    for number, state in enumerate(StreamedModel(Checkpoint(source)).stream(tokens)):
        files.append(folder / f"chain_{number}.safetensors")
        save(files[-1], {"heldout": state})
    return files


@pytest.fixture(scope="module", params=["NVFP4", "W3A16"])
def case(request, tmp_path_factory):
    """A plainly rounded release of a tiny MoE, its held-out tokens and its reference chain."""
    folder = tmp_path_factory.mktemp("evaluate")
    source = tiny.write_checkpoint(folder / "moe", "deepseek_v3", num_hidden_layers=2)
    make_release(folder, source, request.param)
    tokens = load_file(folder / "t.safetensors")
    hidden = chain_of(source, tokens["heldout"], folder)
    write_calibration(folder / "calibration.json")
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
    text = record.reference_text
    assert text.tokens == tokens.tolist() and (text.weights_alone is None) == (scheme == "W3A16")
    alone = torch.tensor(text.weights_alone or text.log_probabilities, dtype=torch.float64)
    whole = logits["release"].gather(-1, tokens[:, 1:, None])[..., 0]
    assert (alone - whole).abs().mean() < 0.01, "of decoded weights, as transformers has them"
    if scheme == "NVFP4":
        assert text.log_probabilities != text.weights_alone, "rounded activations make another number"
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
    assert record.rounded == record.quantized and record.kl_change == KlChange(difference=0, stderr=0)
    assert record.quantized.kl_divergence_stderr > 0
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
    for row, label in ((0, 0), (1, 2)):
        tally.add(ours[row : row + 1], source[row : row + 1], torch.tensor([label]))
    quality = tally.quality()
    first = 0.5 * math.log(2) + 0.25 * math.log(0.5)
    second = 0.4 * math.log(2) + 0.6 * math.log(0.75)
    assert quality.kl_divergence == pytest.approx((first + second) / 2, rel=1e-6)
    assert quality.perplexity == pytest.approx(math.exp(-(math.log(0.25) + math.log(0.8)) / 2), rel=1e-6)
    assert quality.top1_agreement == 0.5
    assert quality.kl_divergence_stderr == pytest.approx(abs(first - second) / 2, rel=1e-5), "of a mean of two"


def samples_of(divergences: list[list[float]]) -> Tally:
    """A tally of samples of which each token's KL divergence is given, at most 0.6."""
    tally = Tally()
    for row in divergences:
        # (0.5, 0.5) against (p, 1 - p): KL = -log(4 p (1 - p)) / 2
        high = torch.tensor([(1 + math.sqrt(1 - math.exp(-2 * kl))) / 2 for kl in row], dtype=torch.float64)
        ours = torch.stack([high, 1 - high], -1).log()
        tally.add(ours, torch.full_like(ours, math.log(0.5)), torch.zeros(len(row), dtype=torch.long))
    return tally


def test_tokens_of_a_sample_are_no_independent_ones():
    """Samples of different lengths, tokens alike within each: the error is that of the samples, many times as large as
    tokens by themselves would make it. By hand, the ratio estimator of clusters."""
    lengths, levels = [40, 10, 25, 80, 5, 60], [0.1, 0.5, 0.2, 0.3, 0.05, 0.4]
    tally = samples_of([[level] * length for length, level in zip(lengths, levels, strict=True)])
    tokens = sum(lengths)
    mean = sum(n * level for n, level in zip(lengths, levels, strict=True)) / tokens
    squares = sum((n * (level - mean)) ** 2 for n, level in zip(lengths, levels, strict=True))
    quality = tally.quality()
    assert quality.kl_divergence == pytest.approx(mean, rel=1e-9)
    assert quality.kl_divergence_stderr == pytest.approx(math.sqrt(6 / 5 * squares) / tokens, rel=1e-9)
    spread = sum(n * (level - mean) ** 2 for n, level in zip(lengths, levels, strict=True)) / tokens
    assert quality.kl_divergence_stderr > 5 * math.sqrt(spread / tokens)


def test_the_standard_error_is_that_of_samples_drawn_again():
    draw = random.Random(0)
    rows = [[draw.uniform(0, 0.3) * level for _ in range(draw.randint(5, 40))] for level in [0.2, 0.6, 1.0, 1.4] * 10]
    means = []
    for _ in range(4000):
        again = draw.choices(rows, k=len(rows))
        means.append(sum(map(sum, again)) / sum(map(len, again)))
    assert samples_of(rows).quality().kl_divergence_stderr == pytest.approx(statistics.stdev(means), rel=0.06)


def test_of_one_sample_there_is_no_standard_error():
    """Also where others have nothing to predict."""
    quality = samples_of([[0.1, 0.2, 0.3]]).quality()
    assert quality.kl_divergence == pytest.approx(0.2) and quality.kl_divergence_stderr is None
    assert ModelQuality.model_validate_json(quality.model_dump_json()) == quality


def test_a_change_of_kl_has_the_standard_error_of_differences():
    """Samples that differ much, and from each other's divergence by as much each: the change is all but certain."""
    before = [[level] * 10 for level in (0.05, 0.2, 0.35, 0.5)]
    after = [[level - 0.01 * (1 + 0.1 * number) for level in row] for number, row in enumerate(before)]
    change = kl_change(samples_of(before), samples_of(after))
    differences = [-0.01 * (1 + 0.1 * number) for number in range(4)]
    assert change.difference == pytest.approx(statistics.fmean(differences), rel=1e-6)
    assert change.stderr == pytest.approx(statistics.stdev(differences) / 2, rel=1e-6)
    assert samples_of(before).quality().kl_divergence_stderr > 50 * change.stderr
    assert kl_change(samples_of(before[:1]), samples_of(after[:1])).stderr is None


def test_hidden_states_that_are_no_numbers_name_their_block(case):
    _, _, source, _ = case
    model = StreamedModel(Checkpoint(source))
    chain = Chain("r as released", torch.ones(1, 4, 128, dtype=torch.bfloat16))
    chain.advance(model, model.block(0), torch.zeros(1, 4, 128), None)
    chain.hidden[0, 2, 5] = math.inf
    with pytest.raises(RequantError, match="^r as released: block 1: its output has NaN or infinite values"):
        chain.advance(model, model.block(1), torch.zeros(1, 4, 128), None)


def keep_of(experts: list[int]) -> KeepList:
    """Of a tiny MoE whose block 1 has 8 experts in 2 groups."""
    return KeepList(
        model="small",
        source="m",
        method="reap",
        observe="oneshot",
        calibration="c",
        seed=42,
        experts_before=8,
        experts=len(experts),
        groups=2,
        blocks={1: experts},
        never_reached={},
    )


def test_a_release_is_held_against_the_model_that_its_source_is_pruned_from(case):
    _, folder, source, hidden = case
    paths = [folder / name for name in ("model", "t.safetensors", "calibration.json")]
    end = folder / "other.safetensors"
    save(end, {"heldout": load_file(hidden[0])["heldout"]})
    found = [
        evaluate(source, *paths, hidden, "r", "m", 1, folder / "e.json", None, other)
        for other in (None, hidden[-1], end)
    ]
    assert (found[0].original, found[0].against_original) == (None, None)
    assert found[1].against_original == found[1].quantized and found[1].original == found[1].source
    assert found[2].quantized == found[1].quantized
    assert found[2].against_original.kl_divergence > 2 * found[1].against_original.kl_divergence


def test_a_pruned_model_is_held_against_the_original(tmp_path):
    source = tiny.write_checkpoint(tmp_path / "moe", "deepseek_v3", num_hidden_layers=2, n_group=2, topk_group=1)
    tokens = torch.randint(3, 320, (4, 24), generator=torch.Generator().manual_seed(5))
    masks = {f"{part}_mask": torch.ones(4, 24, dtype=torch.uint8) for part in ("calibration", "heldout")}
    save(tmp_path / "t.safetensors", {"heldout": tokens.int()} | masks)
    write_calibration(tmp_path / "c.json")
    chain = chain_of(source, tokens, tmp_path)
    paths = [tmp_path / "t.safetensors", tmp_path / "c.json", chain, 1, tmp_path / "e.json"]
    whole = evaluate_pruned(source, keep_of(list(range(8))), *paths)
    assert whole.pruned == whole.original and whole.block_mse == [0.0, 0.0]
    keep = keep_of([0, 2, 5, 7])
    record = evaluate_pruned(source, keep, *paths)
    models = [StreamedModel(Checkpoint(source, chosen)) for chosen in (None, keep)]
    first, kept = (model.logits_of(tokens)[:, :-1].double().log_softmax(-1) for model in models)
    divergence = float((first.exp() * (first - kept)).sum(-1).mean())
    assert record.pruned.kl_divergence == pytest.approx(divergence, rel=1e-6) and divergence > 0.01
    loss = -float(kept.gather(-1, tokens[:, 1:, None]).mean())
    assert record.pruned.perplexity == pytest.approx(math.exp(loss), rel=1e-6)
    assert record.block_mse[0] == 0 < record.block_mse[1]
    assert (record.model, record.source, record.original.kl_divergence) == ("small", "m", 0)

"""The card says what the records say, all of it, and nothing else.

The records here are made up; the jobs that write real ones are tested with the whole build.
"""

import json
import math
import re
import shlex
import statistics
from collections import Counter
from pathlib import Path

import jinja2
import pytest
import yaml
from card_records import (
    BF16,
    NVFP4,
    PRUNED,
    RELEASE,
    W3A16,
    change,
    load,
    load_test,
    make_copied,
    make_pruned_release,
    make_records,
    provenance_of,
    put,
    served,
    sha,
    write,
)
from huggingface_hub import ModelCard

from requant import card, card_serving, plots, wording
from requant.card import Figures, render_card, render_release_card
from requant.errors import RequantError

FIGURES = Figures("loss.png", "hidden_states.png")


# Ways to build cards from records


def release_text(root: Path, release=NVFP4, **changes) -> str:
    facts = load(root, release, **changes)
    return render_release_card(facts, provenance_of(facts), FIGURES)


def build_text(root: Path) -> str:
    releases = [load(root, NVFP4), load(root, W3A16)]
    figures = Figures("results/card/loss.png", "results/card/hidden_states.png", "results/card/experts.png")
    return render_card(releases, [provenance_of(facts) for facts in releases], figures)


def section(text: str, title: str) -> str:
    """The text under `## title`."""
    return text.split(f"\n## {title}\n", 1)[1].split("\n## ", 1)[0]


def row(text: str, label: str) -> list[str]:
    """The cells after the one that reads `label`, in the only table row that begins so."""
    rows = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith(f"| {label} |")]
    assert len(rows) == 1, f"{label}: {len(rows)} rows"
    return rows[0][1:]


@pytest.fixture
def root(tmp_path):
    make_records(tmp_path)
    make_records(tmp_path, W3A16, "W3A16", seed=1)
    return tmp_path


# What the card says


def test_the_card_has_every_section_in_order(root):
    titles = re.findall(r"^## (.*)$", build_text(root), re.M)
    assert titles == [
        "Variants at a glance",
        "Specification",
        "What is quantized",
        "Recipe",
        "Loss by depth",
        "Experts",
        "Quality",
        "Benchmarks",
        "Verification",
        "Serving",
        "Throughput",
        "Wall time",
        "Provenance",
    ]


def test_variants_stand_side_by_side(root):
    text = section(build_text(root), "Variants at a glance")
    assert row(text, f"[`{NVFP4}`](results/{NVFP4}/model/README.md)") == [
        "NVFP4",
        "2.87\u00a0MB (30.5%)",
        "4.503",
        "4.71\u00a0M",
        "0.01913 ± 0.00053",
        "98.7%",
        "4.210 (4.117)",
        "97.2% to 97.6%",
    ]
    assert row(text, f"[`{W3A16}`](results/{W3A16}/model/README.md)")[:3] == [
        "W3A16",
        "2.87\u00a0MB (30.5%)",
        "4.133",
    ]


def test_specification_counts_what_the_records_count(root):
    text = section(build_text(root), "Specification")
    assert row(text, "Parameters") == ["4,712,345", "4,712,345"]
    assert row(text, "Activated for a token") == ["1,987,321", "1,987,321"]
    assert row(text, "Quantized") == ["4,201,987", "4,201,988"]
    assert row(text, "Blocks") == ["6", "6"]
    assert row(text, "&nbsp;&nbsp;dense") == ["1", "1"]
    assert row(text, "&nbsp;&nbsp;mixture of experts") == ["5", "5"]
    assert row(text, "Routed experts in such a block") == ["16", "16"]
    assert row(text, "Shared experts in such a block") == ["1", "1"]
    assert row(text, "Routed experts that a token uses") == ["4", "4"]
    assert row(text, "Bytes of the shards") == ["2,871,113", "2,871,114"]
    assert row(text, "Bytes of the source's shards") == ["9,423,009", "9,423,009"]
    assert row(text, "Bits a quantized weight, scales included") == ["4.503", "4.133"]


def test_what_stays_as_it_is_has_a_line_for_each_release(root):
    change(root, "results/alpha-nvfp4/pack.json", put("multi_token_prediction", "dropped"))
    kept = [line for line in section(build_text(root), "What is quantized").splitlines() if "bit for bit" in line]
    assert len(kept) == 2 and all(line.startswith("- `") for line in kept)
    assert kept[0].endswith("bit for bit. The layers for multi-token prediction are left out.")
    assert kept[1].endswith("in the release bit for bit.")


def test_a_source_in_fp8_is_said_to_be_so(root):
    assert (
        row(section(build_text(root), "Specification"), "Source's parameters, as they are stored")
        == ["BF16 4,712,345"] * 2
    )
    assert "FP8," not in release_text(root)
    dtypes = {"BF16": 500_029, "F32": 16, "F8_E4M3": 4_212_300}
    change(root, "results/source/alpha/source.json", put("dtypes", dtypes))
    text = release_text(root)
    assert "where the source, stored in FP8, takes 9.42\u00a0MB" in text
    stored = row(section(text, "Specification"), "Source's parameters, as they are stored")
    assert stored == ["F8_E4M3 4,212,300; BF16 500,029; F32 16"]
    assert "in the release bit for bit, in BF16 what the source has in FP8." in section(text, "What is quantized")


@pytest.mark.parametrize("dtype", ["F16", "F32"])
def test_a_source_that_was_rounded_is_said_to_be_so(root, dtype):
    change(root, "results/source/alpha/source.json", put("dtypes", {"BF16": 29, dtype: 4_712_316}))
    text = release_text(root)
    assert f"where the source, stored in {dtype}, takes 9.42\u00a0MB" in text
    wanted = f"in the release bit for bit, rounded once to BF16 what the source has in {dtype}."
    assert wanted in section(text, "What is quantized")
    change(root, "results/source/alpha/source.json", put("dtypes", {"BF16": 4_712_316, dtype: 29}))
    assert "rounded once" not in release_text(root), "single tensors keep their bytes"


def test_what_a_source_has_besides_is_named(root):
    """Tensors of its files on both cards; what lies beside them on the build's alone."""
    assert "Not carried along" not in build_text(root) and "No part of the model" not in build_text(root)
    reason = "no module of the model has it"
    tower = {f"vision_tower.blocks.{number}.weight": reason for number in range(3)}
    change(root, "results/source/alpha/source.json", put("tensors_left_out", tower | {"score.weight": reason}))
    change(root, "results/source/alpha/source.json", put("files_left_behind", ["README.md", "a|b.py", "figures/"]))
    change(root, "results/alpha-nvfp4/pack.json", put("tokenizer_from", "tiktoken.model"))
    for text in (build_text(root), release_text(root)):
        found = section(text, "Provenance")
        assert (
            f"No part of the model, and neither counted nor released: 3 `vision_tower.blocks.*` ({reason}); " in found
        )
        assert f"1 `score` ({reason})." in found and "was converted from the source's `tiktoken.model`." in found
    assert r"Not carried along: `README.md`, `a\|b.py`, `figures/`." in section(build_text(root), "Provenance")
    assert "Not carried along" not in release_text(root)


def test_the_spread_of_tokens_over_experts_is_told(root):
    load_of_block = json.loads((root / f"results/{NVFP4}/blocks/4.json").read_text())["tokens_per_expert"]
    least, middle, most = min(load_of_block), statistics.median(load_of_block), max(load_of_block)
    text = section(release_text(root), "Experts")
    assert row(text, "4") == ["31,233", "16", f"{least:,}", wording.figure(middle), f"{most:,}", "0"]


def test_recipe_has_texts_and_every_setting(root):
    text = section(build_text(root), "Recipe")
    assert "123 samples of 256 tokens, 31,233 tokens in all; documents joined and cut to length; seed 43" in text
    assert row(text, "calibration | exercises") == ["exercises", "62.5%", "1,202", "98,702", "62", "15,617"]
    assert row(text, "`engine`") == ["auto_round 0.16.1"] * 2
    settings = json.loads((root / f"results/{NVFP4}/blocks/0.json").read_text())["settings"]
    for key, value in settings.items():
        assert row(text, f"`{key}`")[0] == wording.setting(value)


def test_linears_are_counted_by_what_became_of_them(root):
    text = section(build_text(root), "What is quantized")
    assert row(text, "`model.layers.*.mlp.experts.*.up_proj`") == [
        "80 in NVFP4, 136 × 128",
        "80 in W3A16, 136 × 128",
    ]
    assert row(text, "`model.layers.*.mlp.up_proj`") == ["1 in NVFP4, 136 × 128", "1 in W3A16, 136 × 128"]
    assert row(text, "`model.layers.*.mlp.gate`") == ["5 in BF16: router: decides which experts run"] * 2
    assert "117 of the source's 295 tensors" in text


def test_a_linear_kept_in_one_release_only_shows_both_fates(root):
    def keep(data):
        name = "model.layers.2.self_attn.o_proj"
        del data["quantized"][f"{name}.weight"]
        data["kept"][name] = "config: keep o_proj|v_proj"

    change(root, f"results/{W3A16}/blocks/2.json", keep)
    change(
        root,
        f"results/{W3A16}/verify.json",
        lambda v: v["tensors"].pop("model.layers.2.self_attn.o_proj.weight"),
    )
    text = section(build_text(root), "What is quantized")
    assert row(text, "`model.layers.*.self_attn.o_proj`") == [
        "6 in NVFP4, 128 × 96",
        "5 in W3A16, 128 × 96; 1 in BF16: config: keep o_proj\\|v_proj",
    ]


def test_loss_by_depth_is_a_table_and_two_pictures(root):
    text = section(release_text(root), "Loss by depth")
    assert "](loss.png)" in text and "](hidden_states.png)" in text
    assert row(text, "3") == [
        "MoE", "1.31e-03", "8.89e-04", "32.1%", "153 of 200", "7.89e-04", "4.67e-04",
    ]  # fmt: skip
    assert row(text, "0")[0] == "dense"
    of_build = section(build_text(root), "Loss by depth")
    assert sum(line.startswith("| 3 |") and line.endswith("\u00a0s |") for line in of_build.splitlines()) == 2


def slower(value, key: str = ""):
    """A record as other jobs would have written it that took longer, took more memory and ran in another place."""
    if isinstance(value, dict):
        return {name: slower(inner, name) for name, inner in value.items()}
    if isinstance(value, list):
        return [slower(inner, key) for inner in value]
    if key in ("seconds", "startup_seconds", "peak_memory_bytes"):
        return 7 * value + 1
    return {"path": "/elsewhere", "hard_linked": False}.get(key, value)


def test_a_releases_card_is_the_same_whatever_time_it_took_and_wherever_it_was_made(root):
    before, build = release_text(root, configfiles=["mine.yaml"]), build_text(root)
    for path in (root / "results").rglob("*.json"):
        path.write_text(json.dumps(slower(json.loads(path.read_text()))))
    assert release_text(root, configfiles=["other.yaml"]) == before
    assert build_text(root) != build, "the card of the build has the times"
    assert "Wall time" not in before and "model_card.md, has the times" in before


def test_a_releases_card_says_how_to_check_its_files(root):
    text = section(release_text(root), "Checking the files")
    assert "sha256sum --check SHA256SUMS" in text and "model_signing verify key . --signature model.sig" in text
    assert "Checking the files" not in build_text(root)


def test_long_tables_are_folded(root, monkeypatch):
    assert "<summary>Loss of the 6 blocks" not in release_text(root)
    monkeypatch.setattr(card, "FOLDED_ROWS", 5)
    assert f"<summary>Loss of the 6 blocks of {NVFP4}</summary>" in release_text(root)


def test_experts_never_reached_are_named_by_block(root):
    assert "Calibration tokens reached every expert of every block." in release_text(root)
    for block, experts in ((2, [3]), (4, [0, 1, 2, 9])):
        change(root, f"results/{NVFP4}/blocks/{block}.json", put("never_reached", experts))
    text = section(release_text(root), "Experts")
    assert "Experts never reached: block 2: 3; block 4: 0–2, 9." in text
    assert "reached every expert" not in text


def test_quality_shows_source_rounding_and_release(root):
    text = section(release_text(root), "Quality")
    assert row(text, f"`{NVFP4}` | source")[1:] == ["0 (the reference)", "100.0%", "4.117"]
    assert row(text, f"`{NVFP4}` | NVFP4, plain rounding")[1:] == ["0.03127 ± 0.00091", "97.5%", "4.304"]
    assert row(text, f"`{NVFP4}` | NVFP4, this release")[1:] == ["0.01913 ± 0.00053", "98.7%", "4.210"]


@pytest.mark.parametrize(
    ("kl", "stderr", "sentence"),
    [
        (
            0.01913,
            0.00053,
            "tuning lowered the KL divergence from 0.03127 to 0.01913 nats a token, by 38.8%.",
        ),
        (
            0.04127,
            0.00053,
            "tuning raised the KL divergence from 0.03127 to 0.04127 nats a token: on these tokens",
        ),
        (0.03128, 0.00053, "to 0.03128 nats a token; the difference may be chance: its 95% interval has zero"),
    ],
)
def test_the_card_says_what_tuning_bought_even_if_nothing(root, kl, stderr, sentence):
    change(root, f"results/{NVFP4}/evaluate.json", put("quantized", "kl_divergence", kl))
    change(root, f"results/{NVFP4}/evaluate.json", put("quantized", "kl_divergence_stderr", stderr))
    assert sentence in section(release_text(root), "Quality")


@pytest.mark.parametrize(
    ("change_of_kl", "sentence"),
    [
        ({"difference": -0.0002, "stderr": 0.00005}, "tuning lowered the KL divergence from 0.03127 to 0.03107 nats"),
        ({"difference": -0.0002, "stderr": 0.00015}, "the difference may be chance: its 95% interval has zero in it."),
        ({"difference": -0.0002, "stderr": None}, "the difference may be chance: one sample has no standard error."),
    ],
)
def test_what_tuning_bought_is_held_against_the_standard_error_of_the_difference(root, change_of_kl, sentence):
    """On the same samples: far below that of either, which would hide it."""
    path = f"results/{NVFP4}/evaluate.json"
    change(root, path, put("quantized", "kl_divergence", 0.03107))
    change(root, path, lambda record: record.update(kl_change=change_of_kl))
    assert sentence in section(release_text(root), "Quality")


def test_a_divergence_of_one_sample_stands_without_an_error(root):
    path = f"results/{NVFP4}/evaluate.json"
    for model in ("source", "rounded", "quantized"):
        change(root, path, put(model, "kl_divergence_stderr", None))
    text = section(release_text(root), "Quality")
    assert row(text, f"`{NVFP4}` | NVFP4, this release")[1:] == ["0.01913", "98.7%", "4.210"]
    assert "the difference may be chance: one sample has no standard error." in text


def test_losses_of_all_samples_are_compared_where_they_were_measured(root):
    """Else those of two minibatches, with a star, and a word of what that means."""
    blocks = [f"results/{NVFP4}/blocks/{block}.json" for block in range(6)]
    title, minibatches = "Loss by depth", "of different minibatches"
    text = section(release_text(root), title)
    assert minibatches in text and "all samples" not in text and "*" not in row(text, "3")[2]
    for number, path in enumerate(blocks[:-1]):
        judged = {"0": 0.5, "19": 0.25, "150": 0.5, str(150 + number): 0.125}
        change(root, path, lambda block, judged=judged: block.update(judged=judged))
    text = section(release_text(root), title)
    assert "Both are of all samples; where a star stands they are of two minibatches" in text
    assert row(text, "3")[1:4] == ["5.00e-01", "1.25e-01", "75.0%"]
    assert row(text, "5")[2].endswith("*")
    plots.plot_loss(root / "minibatch.png", {NVFP4: load(root).blocks})
    change(root, blocks[-1], lambda block: block.update(judged={"0": 0.5, "155": 0.5}))
    text = section(release_text(root), title)
    assert "Both are of all samples." in text and minibatches not in text and row(text, "5")[3] == "0.0%"
    plots.plot_loss(root / "samples.png", {NVFP4: load(root).blocks})
    assert (root / "samples.png").read_bytes() != (root / "minibatch.png").read_bytes()
    change(root, blocks[-1], lambda block: block.update(judged={"0": 0.5}))
    with pytest.raises(RequantError, match=r"blocks/5\.json: .*judged: \[0\]; expected 0 and best_iteration 155"):
        load(root)


def test_exact_weights_are_called_exact(root):
    verified = f"results/{NVFP4}/verify.json"
    name = min(json.loads((root / verified).read_text())["tensors"].items(), key=lambda item: item[1]["cosine"])[0]
    change(root, verified, put("tensors", name, "sqnr_db", None))
    change(root, verified, lambda record: record.update(mean_sqnr_db=None))
    text = section(release_text(root), "Verification")
    assert row(text, f"`{NVFP4}` | `{name}`")[-1] == "exact"
    assert row(text, "Mean signal to quantization noise, dB") == ["exact"]


def test_a_release_without_iterations_is_called_plain_rounding(root):
    for block in range(6):
        path = f"results/{NVFP4}/blocks/{block}.json"
        initial = json.loads((root / path).read_text())["loss_initial"]
        change(root, path, lambda b, loss=initial: b.update(iterations=0, best_iteration=0, loss_best=loss))
    text = release_text(root)
    assert "No block was tuned (0 iterations): the release is plain rounding." in text
    assert "nothing was tuned; the release is plain rounding." in text


def test_benchmarks_have_errors_and_recovery(root):
    text = section(build_text(root), "Benchmarks")
    assert row(text, "exercises")[1:] == [
        "411", "0.905 ± 0.014", "0.883 ± 0.016 (97.6%)", "0.883 ± 0.016 (97.6%)",
    ]  # fmt: skip
    assert row(text, "stories")[0] == "word_perplexity (lower is better)"
    assert row(text, "stories")[2:4] == ["6.037", "6.211 (97.2%)"]
    assert row(text, "`num_fewshot`") == ["0"] and row(text, "`seed`") == ["44"] and row(text, "`limit`") == ["none"]
    assert "Measured with `lm_eval` 0.4.13, benchmark `default`." in text


def test_a_source_score_of_zero_gives_words_not_a_ratio(root):
    for path in (f"results/{NVFP4}/benchmark.json", f"results/{W3A16}/benchmark.json"):
        change(root, path, put("recovery", "exercises/exact_match", None))
    text = build_text(root)
    assert row(section(text, "Benchmarks"), "exercises")[-1].endswith("(the source scored 0: no recovery)")
    recovery = row(section(text, "Variants at a glance"), f"[`{NVFP4}`](results/{NVFP4}/model/README.md)")[-1]
    assert recovery == "97.2%; none for 1 of 2 scores: the source scored 0"


def test_scores_of_a_trial_are_called_so_and_not_published(root):
    release = row(section(release_text(root), "At a glance"), f"`{NVFP4}`")
    assert "model-index" in ModelCard(release_text(root)).data.to_dict() and "trial" not in release_text(root)
    for path in (
        "results/reference/alpha/benchmark/default.json",
        *(f"results/{r}/benchmark.json" for r in (NVFP4, W3A16)),
    ):
        change(root, path, put("settings", "limit", 8))
    text = release_text(root)
    assert "model-index" not in ModelCard(text).data.to_dict()
    assert row(section(text, "At a glance"), f"`{NVFP4}`")[-1] == f"{release[-1]} (a trial)"
    for title in ("At a glance", "Benchmarks"):
        assert "**A trial:**" in section(text, title) and "the first 8 rows of each task" in section(text, title)
    for title in ("Variants at a glance", "Benchmarks"):
        assert "the first 8 rows of each task" in section(build_text(root), title)


def test_verification_names_limits_and_the_worst_tensors(root):
    text = section(build_text(root), "Verification")
    expected = {
        "Quantized tensors, all compared": ["178", "178"],
        "Lowest cosine similarity": ["0.99394", "0.96394"],
        "Highest relative mean absolute error": ["10.89%", "10.89%"],
        "Mean cosine similarity": ["0.99517", "0.99517"],
        "Mean relative mean absolute error": ["9.37%", "9.37%"],
        "Mean signal to quantization noise, dB": ["20.43", "20.43"],
        "Tensors whose codes were derived again bit for bit": ["178", "178"],
        "Groups of fused weights with one global scale": ["47", "47"],
        "Tensors of the source, each accounted for once": ["295", "295"],
        "Public decoder": ["compressed-tensors 0.20.0", "compressed-tensors 0.20.0"],
        "&nbsp;&nbsp;tensors that it decodes to the same values": ["16", "16"],
    }
    assert {label: row(text, label) for label in expected} == expected
    assert text.count("| &nbsp;&nbsp;limit | 0.9850 | 0.9850 |") == 1
    assert text.count("| &nbsp;&nbsp;limit | 14.00% | 14.00% |") == 1
    worst = re.findall(rf"^\| `{NVFP4}` \| `([^`]*)` \| ([\d.]+)", text, re.M)
    checks = json.loads((root / f"results/{NVFP4}/verify.json").read_text())["tensors"]
    lowest = sorted(checks, key=lambda name: checks[name]["cosine"])[:5]
    assert worst == [(name, f"{checks[name]['cosine']:.5f}") for name in lowest]


def test_serving_shows_the_command_and_what_was_served(root):
    text = section(release_text(root), "Serving")
    assert "OMP_NUM_THREADS=1 transformers serve {model} --host 127.0.0.1 --port 8101" in text
    assert "**decoded to BF16**, because transformers 5.23.0 does not divide out" in text
    assert "The packed files themselves were given to no engine here" in text
    assert row(text, "Smoke test") == ["passed"]
    assert row(text, "Agreement with this release's weights") == ["99.2%"]
    assert row(text, "&nbsp;&nbsp;limit") == ["97.0%"]
    assert row(text, "Agreement of the control") == ["14.2%"]
    assert row(text, "&nbsp;&nbsp;what it lacks") == ["block 3 left out"]
    assert row(text, "Served tokens") == ["127"]
    assert row(text, "HTTP status for a request that names another model") == ["400"]
    assert row(text, "Answers on which the source model would differ") == ["1"]
    assert "````text\nAnn has 3 apples and ⟶  2 pears. ```\n````" in text
    change(root, f"results/{NVFP4}/deploy.json", put("why_decoded", None))
    assert "given to no engine" not in release_text(root)


def test_a_served_command_reads_back_as_it_was_run(root):
    command = ["serve", "--model", "{model}", "--name", "two words", "--template", "a'b\"c"]
    change(root, f"results/{NVFP4}/deploy.json", put("command", command))
    text = card_serving.serving_command(load(root).deploy)
    assert shlex.split(text) == ["OMP_NUM_THREADS=1", *command]


def test_each_check_of_the_smoke_test_has_its_verdict(root):
    text = section(release_text(root), "Serving")
    assert row(text, "greedy") == ["passed", "127", "0.992 of 127", "0.97"]
    assert row(text, "stop sequences") == ["not applicable", "—", "no answer to stop"]


def test_the_card_says_what_the_engine_computed_with(root):
    path = f"results/{NVFP4}/deploy.json"
    assert "Computed with" not in release_text(root), "a record that does not say"
    unlike = "the engine leaves activations in BF16"
    arithmetic = {"rounds": "none", "known_from": "the engine's log: Marlin in Linears", "unlike_evaluated": unlike}
    change(root, path, put("arithmetic", arithmetic))
    text = section(release_text(root), "Serving")
    assert row(text, "Computed with") == ["weights alone, activations in BF16"]
    assert row(text, "&nbsp;&nbsp;known from") == ["the engine's log: Marlin in Linears"]
    assert f"**Served with another arithmetic than evaluated**: {unlike}." in text
    change(root, path, put("arithmetic", {"rounds": "all", "known_from": "its documentation"}))
    text = section(release_text(root), "Serving")
    assert row(text, "Computed with") == ["activations rounded as the format says"]
    assert "another arithmetic" not in text


def test_the_card_says_how_much_chance_explains(root):
    path = f"results/{NVFP4}/deploy.json"
    change(root, path, put("agreement_least", 0.9134))
    change(root, path, put("differing", 0.0071))
    change(root, path, put("control", None))
    text = section(release_text(root), "Serving")
    assert row(text, "&nbsp;&nbsp;what chance explains of so few") == ["91.3%"]
    assert row(text, "&nbsp;&nbsp;two right roundings differ, at most") == ["0.7%"]
    assert row(text, "&nbsp;&nbsp;what it lacks") == ["no control differs"]


def test_a_container_is_shown_as_the_command_that_starts_it(root):
    request = {
        "name": "requant-{port}",
        "network_mode": "host",
        "mounts": [{"Type": "bind", "Source": "{model}", "Target": "/model", "ReadOnly": True}],
        "environment": {"HF_HUB_OFFLINE": "1"},
        "labels": {"requant.served": "x"},
        "auto_remove": False,
        "entrypoint": ["vllm"],
        "image": "vllm/vllm-openai:v1",
        "command": ["serve", "/model", "--port", "{port}"],
        "mem_limit": 1000,
    }
    container = {"request": request, "image_id": "sha256:12", "image_digests": ["vllm/vllm-openai@sha256:34"]}
    change(root, f"results/{NVFP4}/deploy.json", put("container", container))
    text = section(release_text(root), "Serving")
    assert "--mount type=bind,source={model},target=/model,readonly" in text and "--port {port}" in text
    assert "vllm/vllm-openai@sha256:34" in text


def test_throughput_is_on_the_card_of_the_build_alone(root):
    text = section(build_text(root), "Throughput").partition(f"### `{W3A16}`")[0]
    assert "some processor, Linux x86_64, 1 thread" in text
    assert row(text, "4") == [
        "12",
        "31.00",
        "0.1748 (0.1451 to 0.2080)",
        "15.43 (12.80 to 18.36)",
        "57.30 (47.56 to 68.19)",
    ]
    assert row(text, "1")[3] == "—"
    assert "Throughput" not in release_text(root)


def test_what_was_served_early_is_told(root):
    write(root, f"results/{NVFP4}/load_test.json", load_test(NVFP4))
    text = render_release_card(load(root, load_test=True), provenance_of(load(root)), FIGURES)
    assert "blocks 0 to 1 were served by the same engine" in text and "98.4% of 63 served tokens" in text
    assert "served by the same engine" not in release_text(root)


def test_benchmarks_of_the_served_model_have_range_source_and_test(root):
    records = {
        "gsm8k": served(NVFP4),
        "mmlu": served(
            NVFP4,
            "mmlu",
            score=0.6911,
            verdict="below",
            source_kind="cited",
            citation="a paper",
            source_stderr=None,
            recovery_interval=None,
            paired={},
            unpaired_because="the source's score is a published one",
        ),
    }
    for name, record in records.items():
        write(root, f"results/{NVFP4}/served_benchmarks/{name}.json", record)
    facts = load(root, served=list(records))
    text = section(render_release_card(facts, provenance_of(facts), FIGURES), "Benchmarks")
    assert row(text, "gsm8k, 5-shot")[1:] == [
        "exact_match",
        "411",
        "0.821 ± 0.011",
        "0.78 to 0.88: inside",
        "0.830 ± 0.010",
        "98.9% (97.3% to 100.5%)",
        "p = 0.1038 (McNemar, exact; better on 17, worse on 29)",
    ]
    assert row(text, "mmlu, 5-shot")[4:] == [
        "0.78 to 0.88: **below**",
        "0.8301, published: a paper",
        "98.9%",
        "the source's score is a published one",
    ]
    assert "gsm8k (version 3); by generation, as plain text, temperature 0, seed 42, 1 run, 1,319 requests" in text
    assert "A trial" not in text and "As served" not in release_text(root)


def test_a_served_trial_is_called_so(root):
    record = served(NVFP4)
    record["measured"]["limit"] = 20
    write(root, f"results/{NVFP4}/served_benchmarks/gsm8k.json", record)
    facts = load(root, served=["gsm8k"])
    text = render_release_card(facts, provenance_of(facts), FIGURES)
    assert "**A trial:** gsm8k (20) asked no more than the first rows" in text


def test_wall_time_counts_shared_stages_once(root):
    text = section(build_text(root), "Wall time")
    assert row(text, "Check the files of `alpha`") == ["3", "1.4\u00a0s"]
    assert row(text, "Reference chain of `alpha` over `default`") == ["6", "27.7\u00a0s"]
    assert row(text, f"Quantize `{NVFP4}`") == ["6", "2\u00a0min\u00a026\u00a0s"]
    paths = [path for path in (root / "results").rglob("*.json") if path.name != "throughput.json"]  # a part of deploy
    records = [json.loads(path.read_text()) for path in paths]
    total = sum(record["seconds"] for record in records if "seconds" in record)
    assert row(text, "**All**") == ["33", wording.duration(total)]
    assert "was 1.21\u00a0GB" in text


def test_provenance_has_hashes_and_versions(root):
    text = section(build_text(root), "Provenance")
    assert "commit `0123abc`" in text
    assert "torch 2.13.0, transformers 5.23.0" in text
    for value in (
        sha(("alpha", 2)),
        sha("calibration"),
        sha("heldout"),
        sha("tokenizer"),
        sha("stories"),
        sha(W3A16),
    ):
        assert f"`{value}`" in text
    assert "/private/" not in build_text(root), "paths of the machine are nobody's business"


def test_the_command_to_rebuild_has_the_config_files_of_the_build(root):
    plain = f"snakemake --cores all results/{NVFP4}/pack.json"
    assert f"`{plain}`, with" in section(build_text(root), "Provenance")
    facts = load(root, configfiles=["mine.yaml", "two words.yaml"])
    text = render_card([facts], [provenance_of(facts)], FIGURES)
    assert f"`{plain} --configfile mine.yaml 'two words.yaml'`, with" in section(text, "Provenance")


def test_a_release_is_rebuilt_elsewhere_from_its_provenance(root):
    text = section(release_text(root, configfiles=["mine.yaml"]), "Provenance")
    assert "`requant reproduce provenance.json --into DIRECTORY`" in text and "mine.yaml" not in text


def test_blocks_made_by_different_libraries_are_told_apart(root):
    for block in (4, 5):
        change(root, f"results/{NVFP4}/blocks/{block}.json", put("libraries", {"torch": "2.14.0"}))
        change(root, f"results/{NVFP4}/blocks/{block}.json", put("threads", 7))
    text = release_text(root)
    assert "Libraries that made blocks 0–3: torch 2.13.0, transformers 5.23.0." in text
    assert "Libraries that made blocks 4–5: torch 2.14.0." in text
    assert row(section(text, "Recipe"), "`threads`") == ["1", "7"]


def test_every_section_names_records_that_exist(root):
    for text in (build_text(root), release_text(root)):
        sections = re.split(r"^## ", text, flags=re.M)[1:]
        for part in sections:
            named = re.findall(r"`(results/[^`]*\.json)`", "".join(re.findall(r"<sub>From .*</sub>", part)))
            assert named, part.splitlines()[0]
            for name in named:
                for path in expanded(name):
                    assert path.endswith("/model/provenance.json") or (root / path).exists(), path


def expanded(name: str) -> list[str]:
    """results/r/{pack,verify}.json and results/r/blocks/0.json … 5.json as single paths."""
    if "{" in name:
        folder, names = re.fullmatch(r"(.*)/\{(.*)\}\.json", name).groups()
        return [f"{folder}/{part}.json" for part in names.split(",")]
    if " … " in name:
        first, last = name.split(" … ")
        folder, start = first.rsplit("/", 1)
        stem = re.fullmatch(r"(.*?)\d+\.json", start)[1]
        return [f"{folder}/{stem}{i}.json" for i in range(int(re.search(r"(\d+)\.json", last)[1]) + 1)]
    return [name]


# No number without a record

NUMBER = re.compile(r"(?<![\w.^&-])\d[\d,]*(?:\.\d+)*(?:e[+-]\d+)?(?![\w^])")


def leaves(data) -> list:
    if isinstance(data, dict):
        return [*data, *(leaf for value in data.values() for leaf in leaves(value))]
    if isinstance(data, list):
        return [leaf for value in data for leaf in leaves(value)]
    return [data]


def forms(value) -> set[str]:
    """The ways in which a card may write `value`."""
    if isinstance(value, str):
        return set(NUMBER.findall(value))
    if value is None or isinstance(value, bool):
        return set()
    texts = [
        wording.figure(value),
        wording.percent(value),
        wording.percent(value, 2),
        wording.decimals(value),
        f"{value:g}",
    ]
    texts += [
        wording.scientific(value),
        wording.duration(value),
        *(f"{value:,.{places}f}" for places in range(8)),
    ]
    if isinstance(value, int):
        texts += [str(value), wording.short(value), wording.size(value)]
    return {found for text in texts for found in NUMBER.findall(text.replace("\u00a0", " ").replace("%", ""))}


def supported_numbers(root: Path, names: list[str]) -> set[str]:
    """Numbers of the records and those worked out from them, worked out here once more."""
    records = {str(path.relative_to(root)): json.loads(path.read_text()) for path in (root / "results").rglob("*.json")}
    values = [leaf for record in records.values() for leaf in leaves(record)]
    times = Counter()
    for path, record in records.items():
        if path.endswith("throughput.json"):  # its time is a part of the deploy stage's
            continue
        stage = str(Path(path).parent) if "routing_" in path else path
        times.update({"all": record.get("seconds", 0), stage: record.get("seconds", 0)})
    values += [*times.values(), sum("seconds" in record for record in records.values()) - len(names)]
    for name in names:
        pack, verify, evaluate = (records[f"results/{name}/{stage}.json"] for stage in ("pack", "verify", "evaluate"))
        blocks = [records[f"results/{name}/blocks/{block}.json"] for block in range(RELEASE["blocks"])]
        values += [pack["bytes"] / pack["source_bytes"], pack["quantized_parameters"] / pack["parameters"]]
        values += [len(verify["tensors"]), len(blocks), math.fsum(block["seconds"] for block in blocks)]
        values += [len(records[f"results/{name}/deploy.json"]["answers"])]
        tuned = [block for block in blocks if "losses" in block]
        values += [1 - block["loss_best"] / block["loss_initial"] for block in tuned]
        if tuned:
            values += [1 - evaluate["quantized"]["kl_divergence"] / evaluate["rounded"]["kl_divergence"]]
        routing = [
            records[f"results/reference/{pack['model']}/default/routing_{block}.json"] for block in range(len(blocks))
        ]
        for block in tuned or routing:
            load = block["tokens_per_expert"]
            values += [len(load), *((min(load), max(load), statistics.median(load)) if load else ())]
        for kind in ("quantized", "kept"):
            values += Counter(card.linear_pattern(linear) for block in tuned for linear in block[kind]).values()
    return {form for value in values for form in forms(value)}


def unsupported_numbers(text: str, supported: set[str]) -> list[str]:
    """Numbers in table rows of `text` (code left out) that are not `supported`."""
    rows = [line for line in text.splitlines() if line.startswith("| ")]
    return [
        f"{found} in {line}"
        for line in rows
        for found in NUMBER.findall(re.sub(r"`[^`]*`|\]\([^)]*\)", " ", line).replace("\u00a0", " "))
        if found not in supported
    ]


def test_every_number_in_a_table_comes_from_a_record(root):
    supported = supported_numbers(root, [NVFP4, W3A16])
    text = build_text(root)
    assert sum(len(NUMBER.findall(line)) for line in text.splitlines() if line.startswith("| ")) > 400
    assert unsupported_numbers(text, supported) == []
    assert unsupported_numbers(release_text(root), supported) == []
    assert unsupported_numbers("| Expert | 8 of 384 |", supported) == ["384 in | Expert | 8 of 384 |"]


def test_templates_hold_no_measured_number():
    for path in (Path(card.__file__).parent / "templates").glob("*.j2"):
        text = re.sub(r"\{[{%#].*?[}%#]\}", " ", path.read_text(), flags=re.S)
        words = {"95 % interval", "iteration 0", "(0 iterations)", "scored 0", "0 (the reference)"}
        for word in words:
            text = text.replace(word, " ")
        assert NUMBER.findall(text) == [], path.name


# What is missing or wrong is an error

RECORDS = [
    "results/source/alpha/source.json",
    "results/calibration/alpha/default/calibration.json",
    "results/reference/alpha/default/routing_3.json",
    "results/reference/alpha/benchmark/default.json",
    f"results/{NVFP4}/blocks/4.json",
    *(f"results/{NVFP4}/{stage}.json" for stage in ("pack", "verify", "evaluate", "deploy", "benchmark")),
]


@pytest.mark.parametrize("path", RECORDS)
def test_a_missing_record_is_an_error_that_names_it(root, path):
    (root / path).unlink()
    with pytest.raises(RequantError) as caught:
        load(root)
    assert path in str(caught.value) and "not there" in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("path", RECORDS)
def test_a_missing_field_is_an_error_that_names_file_and_field(root, path):
    fields = [key for key in json.loads((root / path).read_text()) if key != "libraries"]
    for field in fields:
        original = (root / path).read_text()
        change(root, path, lambda data, field=field: data.pop(field))
        with pytest.raises(RequantError) as caught:
            load(root)
        assert path in str(caught.value) and field in str(caught.value) and "\n" not in str(caught.value)
        (root / path).write_text(original)


@pytest.mark.parametrize(
    ("path", "edit", "key"),
    [
        (f"results/{NVFP4}/blocks/2.json", put("block", 3), "block"),
        (f"results/{NVFP4}/blocks/2.json", put("scheme", "W4A16"), "scheme"),
        (f"results/{NVFP4}/blocks/2.json", put("libraries", {}), "libraries"),
        (f"results/{NVFP4}/blocks/2.json", put("tokens_per_expert", [1, 2]), "tokens_per_expert"),
        (f"results/{NVFP4}/pack.json", put("blocks", 7), "blocks"),
        (f"results/{NVFP4}/pack.json", put("model", "gamma"), "model"),
        (f"results/{NVFP4}/verify.json", put("release", W3A16), "release"),
        (f"results/{NVFP4}/verify.json", put("limits", {"cosine": 0.9}), "limits.relative_mae"),
        (f"results/{NVFP4}/verify.json", lambda v: v["tensors"].popitem(), "tensors"),
        (f"results/{NVFP4}/evaluate.json", put("heldout_sha256", sha("other")), "heldout_sha256"),
        (f"results/{NVFP4}/evaluate.json", lambda e: e["block_mse"].pop(), "block_mse"),
        (f"results/{NVFP4}/evaluate.json", lambda e: e["block_mse"][1].pop("rounded"), "block_mse.1.rounded"),
        (f"results/{NVFP4}/benchmark.json", put("recovery", {"stories/word_perplexity": 1.0}), "recovery"),
        (f"results/{NVFP4}/benchmark.json", put("recovery", None), "recovery"),
        (f"results/{NVFP4}/benchmark.json", put("source_scores", 0, "value", 0.5), "source_scores"),
        (f"results/{NVFP4}/benchmark.json", lambda b: b["scores"].pop(), "scores"),
        ("results/reference/alpha/benchmark/default.json", put("subject", "gamma"), "subject"),
    ],
)
def test_records_that_contradict_each_other_are_an_error(root, path, edit, key):
    change(root, path, edit)
    with pytest.raises(RequantError) as caught:
        load(root)
    assert f"{path}: {key}" in str(caught.value) and "\n" not in str(caught.value)


def test_a_template_that_asks_for_more_than_records_hold_is_an_error(root, monkeypatch):
    environment = card._environment()
    environment.loader = jinja2.DictLoader({"release_card.md.j2": "{{ releases[0].pack.throughput }}"})
    monkeypatch.setattr(card, "_environment", lambda: environment)
    with pytest.raises(RequantError, match="release_card.md.j2: .*throughput"):
        release_text(root)


def test_provenance_of_other_files_is_an_error(root):
    facts = load(root)
    with pytest.raises(RequantError, match=f"results/{NVFP4}/model/provenance.json: not of the files in"):
        render_release_card(facts, provenance_of(load(root, W3A16)), FIGURES)


# Metadata


def test_metadata_is_what_the_hub_reads(root):
    data = ModelCard(release_text(root)).data.to_dict()
    scores = data.pop("model-index")
    assert data == {
        "base_model": "some-org/alpha",
        "base_model_relation": "quantized",
        "library_name": "transformers",
        "license": "mit",
        "pipeline_tag": "text-generation",
        "tags": [
            "requant",
            "quantized",
            "nvfp4-pack-quantized",
            "compressed-tensors",
            "nvfp4",
            "auto-round",
            "moe",
        ],
    }
    assert scores[0]["name"] == NVFP4
    values = {result["dataset"]["type"]: result["metrics"][0]["value"] for result in scores[0]["results"]}
    assert values == {"exercises": 0.8832, "stories": 6.211}


def test_metadata_of_a_build_covers_all_its_releases(root):
    text = build_text(root)
    data = yaml.safe_load(text.split("---\n")[1])
    assert data["base_model"] == "some-org/alpha" and data["base_model_relation"] == "quantized"
    assert {"nvfp4", "w3a16"} <= set(data["tags"])
    assert "model-index" not in data


def test_without_a_hub_name_no_base_model_is_claimed(root):
    text = release_text(root, base_model=None, license=None)
    data = ModelCard(text).data.to_dict()
    assert not {"base_model", "base_model_relation", "license"} & set(data)
    assert "`alpha` in NVFP4" in text
    assert row(section(text, "Specification"), "Licence of the weights, as configured") == ["not stated"]


def test_a_base_model_that_the_hub_could_not_take_is_an_error(root):
    with pytest.raises(RequantError, match="config: models.alpha.base_model: 'a/b/c'; expected org/name"):
        release_text(root, base_model="a/b/c")


# Releases in BF16


@pytest.fixture
def copied(root):
    make_copied(root)
    return root


def test_a_release_in_bf16_is_nowhere_called_quantized(copied):
    text = release_text(copied, BF16)
    said = ("nothing is quantized", "not quantized")
    assert all(words in text for words in said)
    for words in said:
        text = text.replace(words, "")
    assert re.findall(".*quantiz.*", text, re.IGNORECASE) == []
    assert "plain rounding" not in text and "Loss by depth" not in text and ".png" not in text
    assert "What is quantized" not in text and "What tuning bought" not in text and "held out of tuning" not in text
    data = ModelCard(release_text(copied, BF16)).data.to_dict()
    assert data["tags"] == ["requant", "bf16", "moe"] and "base_model_relation" not in data


def test_a_release_in_bf16_says_what_was_compared(copied):
    text = release_text(copied, BF16)
    tensors = json.loads((copied / f"results/{BF16}/verify.json").read_text())["source_tensors"]
    verified = section(text, "Verification")
    assert f"All {tensors} tensors of `{BF16}` were read back and compared, bit for bit, with" in verified
    assert f"those of the source, {tensors}. The build fails if one differs" in verified
    assert "A tensor that is not quantized has to have the same bits." in verified
    assert f"{tensors} of the source's {tensors} tensors are in the release bit for bit." in section(text, "Weights")
    assert "some-org/alpha in BF16: weights as 16-bit floats, nothing is quantized." in text
    assert f"| `{BF16}` | BF16, this release | 0 | 100.0% |" in section(text, "Quality")
    assert "was not tuned: its tensors are the source's" in section(text, "Recipe")
    facts = load(copied, BF16)
    whole = render_card([facts], [provenance_of(facts)], Figures())
    assert row(section(whole, "Wall time"), f"Copy the blocks of `{BF16}`")[0] == "6"


def test_experts_of_a_release_in_bf16_are_the_sources(copied):
    change(copied, "results/reference/alpha/default/routing_3.json", put("never_reached", [5]))
    experts = section(release_text(copied, BF16), "Experts")
    assert "Experts never reached: block 3: 5." in experts and "can't be tuned" not in experts
    assert "results/reference/alpha/default/" in experts


def test_a_build_may_hold_both(copied):
    releases = [load(copied, name) for name in (NVFP4, BF16)]
    text = render_card(releases, [provenance_of(facts) for facts in releases], Figures("l.png", "h.png", "e.png"))
    assert "1 quantized release and 1 release in BF16 of some-org/alpha" in text
    assert row(section(text, "Specification"), "Bits a quantized weight, scales included")[1] == "16 (not quantized)"
    for title in ("Loss by depth", "What tuning bought"):
        part = text.split(title, 1)[1].split("\n## ", 1)[0]
        assert BF16 not in part.split("Measured on", 1)[0], title
    assert section(text, "Verification").count(f"`{BF16}`") == 1
    assert len(row(section(text, "Verification"), "Lowest cosine similarity")) == 1
    assert len(row(section(text, "Recipe"), "`iters`")) == 1
    data = ModelCard(text).data
    assert data.base_model_relation == "quantized" and {"quantized", "bf16", "nvfp4"} <= set(data.tags)
    assert unsupported_numbers(text, supported_numbers(copied, [NVFP4, BF16])) == []


@pytest.mark.parametrize(
    ("path", "edit", "key"),
    [
        ("blocks/2.json", put("block", 3), "block"),
        ("blocks/2.json", put("losses", []), "losses"),
        ("verify.json", put("unchanged", 5), "unchanged"),
        ("verify.json", put("tensors", {"x": {"block": 0, "cosine": 1, "relative_mae": 0, "sqnr_db": 9}}), "tensors"),
        ("evaluate.json", lambda data: data["block_mse"][1].clear(), "block_mse.1.quantized"),
    ],
)
def test_records_of_a_release_in_bf16_that_contradict_each_other_are_an_error(copied, path, edit, key):
    change(copied, f"results/{BF16}/{path}", edit)
    with pytest.raises(RequantError, match=re.escape(f"results/{BF16}/{path}: {key}")):
        load(copied, BF16)


def test_a_quantized_release_without_its_plain_rounding_is_an_error(root):
    change(root, f"results/{NVFP4}/evaluate.json", put("rounded", None))
    with pytest.raises(RequantError, match=f"results/{NVFP4}/evaluate.json: rounded"):
        load(root)


# Dense models, bytes, pictures


def test_a_dense_release_speaks_of_no_experts(tmp_path):
    make_records(tmp_path, "beta-w4a16", "W4A16", "beta", dense=True)
    text = release_text(tmp_path, "beta-w4a16", model="beta")
    assert "The model is dense: it has no experts" in text
    assert "## Experts" not in text and "Routed experts" not in text
    assert row(section(text, "Specification"), "Blocks") == ["6"]
    assert "moe" not in ModelCard(text).data.tags
    assert unsupported_numbers(text, supported_numbers(tmp_path, ["beta-w4a16"])) == []


def test_models_of_two_kinds_share_a_card(tmp_path):
    make_records(tmp_path)
    make_records(tmp_path, "beta-w4a16", "W4A16", "beta", dense=True)
    releases = [
        load(tmp_path),
        load(tmp_path, "beta-w4a16", model="beta", base_model="some-org/beta", license="other"),
    ]
    text = render_card(releases, [provenance_of(facts) for facts in releases], Figures("l.png", "h.png", "e.png"))
    data = ModelCard(text).data
    assert data.base_model == ["some-org/alpha", "some-org/beta"] and data.license is None
    assert row(section(text, "Specification"), "Routed experts in such a block") == ["16", "0"]
    assert row(section(text, "What is quantized"), "`model.layers.*.mlp.gate`")[1] == "not there"
    assert "beta-w4a16" not in section(text, "Experts")
    assert section(text, "Benchmarks").count("| Task |") == 2


def test_cards_and_pictures_are_the_same_bytes_each_time(root):
    assert build_text(root) == build_text(root)
    facts = load(root)
    for run in ("a", "b"):
        plots.plot_loss(root / run / "loss.png", {NVFP4: facts.blocks})
        plots.plot_hidden_states(root / run / "hidden.png", {NVFP4: facts.evaluate, W3A16: facts.evaluate})
        plots.plot_experts(root / run / "experts.png", card.routing_sets([facts]))
    for name in ("loss.png", "hidden.png", "experts.png"):
        first = (root / "a" / name).read_bytes()
        assert first == (root / "b" / name).read_bytes()
        assert first.startswith(b"\x89PNG")
        assert b"matplotlib" not in first.lower() and b"tEXt" not in first, "no version and no date in the file"


def test_pictures_change_with_the_records(root):
    plots.plot_loss(root / "a.png", {NVFP4: load(root).blocks})
    change(root, f"results/{NVFP4}/blocks/3.json", put("loss_best", 1e-5))
    plots.plot_loss(root / "b.png", {NVFP4: load(root).blocks})
    assert (root / "a.png").read_bytes() != (root / "b.png").read_bytes()


def test_a_loss_of_zero_can_be_drawn_and_told(root):
    for block in range(6):
        change(root, f"results/{NVFP4}/blocks/{block}.json", lambda b: b.update(loss_initial=0.0, loss_best=0.0))
    plots.plot_loss(root / "zero.png", {NVFP4: load(root).blocks})
    assert row(section(release_text(root), "Loss by depth"), "5")[3] == "no loss"


# Numbers as text


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (wording.figure(12345.6), "12,346"),
        (wording.figure(999.97), "1,000"),
        (wording.figure(999.9), "999.9"),
        (wording.figure(4.21), "4.210"),
        (wording.figure(0.0191304), "0.01913"),
        (wording.figure(0.000131), "1.310e-04"),
        (wording.figure(0), "0"),
        (wording.with_error(0.019134, 0.000527), "0.01913 ± 0.00053"),
        (wording.with_error(97.26, 1.44), "97.3 ± 1.4"),
        (wording.with_error(1234.5, 12.3), "1,234 ± 12"),
        (wording.with_error(6.0371, None), "6.037"),
        (wording.with_error(0.5, 0.0), "0.5000"),
        (wording.short(508_400_000_000), "508\u00a0B"),
        (wording.short(4_712_345), "4.71\u00a0M"),
        (wording.short(999), "999"),
        (wording.size(288_700_000_000), "289\u00a0GB"),
        (wording.size(47_400_000), "47.4\u00a0MB"),
        (wording.duration(41.23), "41.2\u00a0s"),
        (wording.duration(59.97), "1\u00a0min\u00a000\u00a0s"),
        (wording.duration(723), "12\u00a0min\u00a003\u00a0s"),
        (wording.duration(3599.7), "1\u00a0h\u00a000\u00a0min"),
        (wording.duration(70_680), "19\u00a0h\u00a038\u00a0min"),
        (wording.percent(0.9758), "97.6%"),
        (wording.ranges([5, 0, 1, 2]), "0–2, 5"),
        (wording.listing(["a", "b", "c"]), "a, b and c"),
        (wording.listing(["a"]), "a"),
        (wording.setting({"a": 1}.get("b")), "none"),
        (wording.setting(True), "true"),
        (wording.setting(1 / 200), "0.005"),
        (wording.setting([]), "none"),
        (wording.cell("a|b\nc"), "a\\|b c"),
        (wording.plural(1, "block"), "1 block"),
        (wording.plural(2000, "token"), "2,000 tokens"),
        (wording.flat({"b": {"c": 1}, "a": 2}), {"a": 2, "b.c": 1}),
        (
            card.linear_pattern("model.layers.3.mlp.experts.7.up_proj.weight"),
            "model.layers.*.mlp.experts.*.up_proj",
        ),
    ],
)
def test_numbers_read_as_people_write_them(text, expected):
    assert text == expected


# Pruned models


@pytest.fixture
def pruned(root):
    """A release of alpha, and one of alpha with 12 of 16 experts in each block."""
    make_pruned_release(root)
    return root


def pruned_build_text(root: Path) -> str:
    releases = [load(root, NVFP4), load(root, "alpha-25-nvfp4", **PRUNED)]
    figures = Figures("l.png", "h.png", "e.png", {"alpha-25-nvfp4": "results/alpha-25-nvfp4/model/saliency.png"})
    return render_card(releases, [provenance_of(facts) for facts in releases], figures)


def pruned_release_text(root: Path) -> str:
    facts = load(root, "alpha-25-nvfp4", **PRUNED)
    figures = Figures("loss.png", "hidden_states.png", None, {facts.name: "saliency.png"})
    return render_release_card(facts, provenance_of(facts), figures)


def test_a_card_without_pruned_models_says_nothing_of_pruning(root):
    text = build_text(root).lower()
    assert "prun" not in text and "original" not in text


def test_variants_stand_beside_the_original(pruned):
    text = section(pruned_build_text(pruned), "Variants at a glance")
    head = "Format | Experts a block | Parameters | Size | KL, nats a token | Top-1 | Perplexity"
    assert row(text, "Model") == [*head.split(" | "), "exercises/exact_match", "stories/word_perplexity"]
    original = ["BF16", "16", "4.71\u00a0M", "9.42\u00a0MB", "0 (the reference)", "100.0%", "4.117"]
    assert row(text, "`alpha`, the original") == [*original, "0.905 ± 0.014", "6.037"]
    assert row(text, "`alpha-25-nvfp4`") == [
        *("NVFP4", "12", "4.71\u00a0M", "2.87\u00a0MB", "0.0917 ± 0.0031", "94.9%", "4.490"),
        *("0.883 ± 0.016", "6.211"),
    ]
    whole = row(text, f"`{NVFP4}`")
    assert whole[1] == "16" and whole[4] == "0.01913 ± 0.00053"


def test_pruning_tells_what_went_how_it_was_chosen_and_what_it_cost(pruned):
    text = section(pruned_release_text(pruned), "Pruning")
    assert "**12 of 16 routed experts** of `alpha` are kept in each of its 5 MoE blocks, 3 of 4 in each" in text
    assert "the router's 4 groups. They were chosen by REAP saliency" in text
    assert "Observed: all blocks of the original model in one pass, over the calibration tokens `default`." in text
    assert "no calibration token reached: block 3: 0, 4." in text
    assert "![Saliency of each expert by block, dropped experts marked](saliency.png)" in text
    tokens = sum(100 + expert for expert in range(16))
    lost_tokens, lost_mass = 100 + 104 + 108 + 112, 100 + 104 + 108 + 112
    mass = sum((1 + expert % 4) * (100 + expert) for expert in range(16))
    assert row(text, "2") == [
        "0, 4, 8, 12", wording.percent(1 - lost_tokens / tokens), wording.percent(1 - lost_mass / mass)
    ]  # fmt: skip
    assert row(text, "Experts chosen by") == ["the original", "reap", "random"]
    assert row(text, "KL divergence from the original, nats a token") == ["0", "0.0583 ± 0.0021", "0.1731 ± 0.0021"]
    assert row(text, "Perplexity") == ["4.117", "4.397", "4.397"]
    assert row(text, "exercises, exact_match") == ["0.905 ± 0.014", "0.847 ± 0.014", "0.732 ± 0.014"]
    assert row(text, "stories, word_perplexity (lower is better)") == ["6.037", "6.300", "6.300"]


def test_quality_of_a_pruned_release_is_against_the_pruned_model_and_the_original(pruned):
    text = section(pruned_release_text(pruned), "Quality")
    assert "| the pruned model | 0 (the reference) |" in text
    assert (
        "`alpha-25-nvfp4` against `alpha`: KL divergence 0.0917 ± 0.0031 nats a token, top-1 agreement 94.9%, "
        "perplexity 4.490 (the original's 4.117)." in text
    )


def test_the_hub_is_told_that_experts_were_pruned(pruned):
    assert {"pruned", "reap", "moe"} <= set(ModelCard(pruned_release_text(pruned)).data.tags)


def test_wall_time_counts_the_original_s_chain_and_the_comparisons_once(pruned):
    text = section(pruned_build_text(pruned), "Wall time")
    assert row(text, "Reference chain of `alpha` over `default`")[0] == "6"
    assert row(text, "Reference chain of `alpha-25` over `default`")[0] == "6"
    assert row(text, "Hold `alpha-25.random` against `alpha`") == ["1", "5.9\u00a0s"]
    assert row(text, "Benchmark `alpha`")[0] == "1"


def test_an_evaluation_of_another_model_is_refused(pruned):
    change(pruned, "results/alpha-25/prune/evaluate.json", put("source", "beta"))
    with pytest.raises(RequantError, match=r"alpha-25 of beta; expected alpha-25 of alpha; delete it to rebuild"):
        pruned_release_text(pruned)


def test_each_model_has_its_own_heat_map_of_tokens(pruned):
    releases = [load(pruned, NVFP4), load(pruned, "alpha-25-nvfp4", **PRUNED)]
    assert list(card.routing_sets(releases)) == ["alpha over the tokens default", "alpha-25 over the tokens default"]


def test_the_heat_map_of_saliencies_is_the_same_bytes_and_depends_on_what_is_dropped(pruned, tmp_path):
    facts = load(pruned, "alpha-25-nvfp4", **PRUNED)
    pictures = [tmp_path / name for name in ("a.png", "b.png", "c.png")]
    more = facts.pruning.keep.model_copy(update={"blocks": dict.fromkeys(range(1, 6), list(range(12)))})
    for path, keep in zip(pictures, (facts.pruning.keep, facts.pruning.keep, more), strict=True):
        plots.plot_saliency(path, keep, facts.pruning.tables)
    first, second, third = (path.read_bytes() for path in pictures)
    assert first == second != third

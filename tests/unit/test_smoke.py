"""Each check of the smoke test, on an engine that is right and on one that has just that fault."""

import contextlib
import re
from itertools import accumulate
from pathlib import Path
from types import SimpleNamespace

import damage
import openai_stand_in as stand_in
import pytest
import torch
from demo_release import DEMO, DemoRelease, make_release

from requant import decisions, deploy, smoke, vocabulary
from requant.checkpoint import Checkpoint
from requant.config import Deploy, Target, Throughput
from requant.errors import RequantError
from requant.records import Check, DeployRecord, FailedDeployRecord, ThroughputRecord, read_json
from requant.replay import Served

# Decoded: the stand-in computes with transformers, which reads packed experts wrong.
TARGET = Target(engine="vllm", device="cuda", gpu="sm100", devices=8, context=512, weights="decoded")
SETTINGS = Deploy(
    target="eight",
    prompts=2,
    prompt_tokens=32,
    max_tokens=12,
    reference_tokens=1024,
    long_prompt_tokens=128,
    throughput=Throughput(concurrency=[2, 1], prompt_tokens=8, max_tokens=3, repeats=2, warmup=1),
)


@pytest.fixture(scope="module")
def release(tmp_path_factory) -> DemoRelease:
    return make_release("NVFP4", tmp_path_factory.mktemp("release"))


@pytest.fixture
def run(release, tmp_path, monkeypatch):
    """The smoke test with the stand-in for its engine: its checks by name."""

    def run(*faults: str, damaged: damage.Damage = lambda folder: None, engine: str = "vllm") -> dict[str, Check]:
        @contextlib.contextmanager
        def serve(target, model, log, threads):
            damaged(model)
            with stand_in.serve(model, frozenset(faults), target.context, engine) as server:
                yield server

        monkeypatch.setattr(deploy, "serve_at", serve)
        made = release.folder
        records = (made / "pack.json", made / "evaluate.json", made / "tokens.safetensors")
        outputs = (tmp_path / "served", tmp_path / "log", 1, tmp_path / "deploy.json", tmp_path / "throughput.json")
        target = TARGET.model_copy(update={"engine": engine})
        try:
            record = deploy.smoke_test("demo", DEMO / "model", made / "model", *records, SETTINGS, target, *outputs)
        except RequantError:
            record = read_json(tmp_path / "deploy.failed.json", FailedDeployRecord)
            assert not (tmp_path / "deploy.json").exists() and not (tmp_path / "throughput.json").exists()
        return {check.name: check for check in record.checks}

    return run


def failed(checks: dict[str, Check]) -> set[str]:
    return {name for name, check in checks.items() if check.verdict == "failed"}


def test_an_engine_with_log_probabilities_passes(run, tmp_path):
    checks = run()
    assert {name: check.verdict for name, check in checks.items()} == dict.fromkeys(smoke.ALL, "passed")
    assert "the engine's mean" in checks[smoke.LOG_PROBABILITIES].found
    assert checks[smoke.TOKENIZER].found.startswith("1101 tokens and 3 texts the same")
    assert read_json(tmp_path / "deploy.json", DeployRecord).engine == "vllm"
    speed = read_json(tmp_path / "throughput.json", ThroughputRecord)
    assert [(level.concurrency, level.requests) for level in speed.levels] == [(1, 2), (2, 4)]
    for level in speed.levels:
        assert level.tokens.lowest == level.tokens.highest == 3, "an end of text ends nothing"
        assert 0 < level.first_token_seconds.lowest <= level.first_token_seconds.highest


@pytest.mark.parametrize(
    "faults",
    [
        {"any_name": smoke.WRONG_NAME, "crashes": smoke.TOO_LONG, "no_logprobs": smoke.LOG_PROBABILITIES},
        {"ignores_stop": smoke.STOP, "mixes": smoke.CONCURRENCY, "one_piece": smoke.STREAMING},
        {"bad_whole": smoke.STREAMING},
    ],
    ids=" ".join,
)
def test_each_fault_fails_its_check_and_no_other(run, faults):
    """Faults that have nothing to do with each other are served together."""
    checks = run(*faults)
    assert failed(checks) == set(faults.values()) | ({smoke.STOP} if "bad_whole" in faults else set())


@pytest.mark.parametrize(
    ("fault", "expected"),
    [
        ("loops", {smoke.GREEDY, smoke.REPETITION}),
        ("garbles", {smoke.GREEDY, smoke.GARBLE}),
        ("cuts_prompts", {smoke.LONG_PROMPT, smoke.TOKENIZER, smoke.LOG_PROBABILITIES}),
    ],
)
def test_a_fault_of_the_text_fails_these_checks_too(run, fault, expected):
    assert expected <= failed(run(fault))


def test_sglang_answers_any_name_and_is_not_blamed(run):
    checks = run("any_name", engine="sglang")
    assert checks[smoke.WRONG_NAME].verdict == "not applicable" and not failed(checks)


@pytest.mark.parametrize("linear", ["3.mlp.experts.5.down_proj", "1.self_attn.o_proj"])
def test_a_doubled_scale_is_seen_in_log_probabilities(run, release, linear):
    assert smoke.LOG_PROBABILITIES in failed(run(damaged=damage.double_scale(release.packed, f"model.layers.{linear}")))


def test_swapped_experts_are_seen_in_log_probabilities(run):
    assert smoke.LOG_PROBABILITIES in failed(run(damaged=damage.swap_experts(4, 2, 11)))


def test_exchanged_tokens_are_seen_by_asking_for_the_whole_vocabulary(run):
    checks = run(damaged=damage.swap_tokens(1043, 777))
    assert smoke.TOKENIZER in failed(checks)
    assert "where ours read" in checks[smoke.TOKENIZER].found


def test_an_engine_that_is_gone_fails_what_asks_it(run, monkeypatch):
    def refuse(*_):
        raise RequantError("it went away")

    monkeypatch.setattr("requant.questions.ask_all", refuse)
    checks = run()
    assert {smoke.GREEDY, smoke.CONCURRENCY, smoke.LONG_PROMPT} <= failed(checks)
    assert checks[smoke.GREEDY].found == "it went away"
    assert checks[smoke.STREAMING].verdict == "not applicable"


# The symptoms, by themselves.


def answer(*texts: str, agrees: bool = True) -> Served:
    steps = list(accumulate(texts))
    return Served("prompt", [1, 2], steps, agrees=[agrees] * len(steps), read=2)


def test_tokens_that_complete_no_character_are_no_pieces():
    assert smoke.growths(answer("a", "", "", "b")) == 2
    assert smoke.growths(answer("", "", "🙂")) == 1


@pytest.mark.parametrize(("whole", "verdict"), [("an ow\ufffd", "passed"), ("an ow", "passed"), ("an o", "failed")])
def test_a_character_that_is_not_complete_is_in_no_piece(monkeypatch, whole, verdict):
    choice = SimpleNamespace(text=whole)
    create = SimpleNamespace(create=lambda **_: SimpleNamespace(choices=[choice]))
    monkeypatch.setattr(smoke, "stream", lambda *_: (["an", " ow"], 1, 3))
    answer = Served("p", [1], ["an", "an ow", "an ow"])
    assert smoke.streaming(SimpleNamespace(completions=create), "m", [answer], 3).verdict == verdict


def test_a_loop_is_a_run_of_tokens_four_times_over():
    assert smoke.loops(list(accumulate(["a", " b", " c", " c", " c", " c"])))
    assert smoke.loops(list(accumulate(["x", *["a", "b", "c"] * 4])))
    assert not smoke.loops(list(accumulate(["a", " c", " c", " c"])))
    assert not smoke.loops(list(accumulate(["a", "b", "c"] * 4 + ["d"])))
    assert not smoke.loops([""] * 9), "tokens without a text are no loop"


def test_a_loop_of_the_checkpoints_own_is_no_fault_of_the_engine():
    own, foreign = answer(*["a"] * 8), answer(*["a"] * 8, agrees=False)
    assert smoke.repetition([own, answer("a", "b")], 0.95).verdict == "passed"
    check = smoke.repetition([own, foreign], 0.95)
    assert check.verdict == "failed" and check.found.startswith("2 of 2 answers end in a loop, 1 by")


def test_strange_characters_are_those_that_no_text_has():
    assert smoke.strangeness("Größe, 大きさ, размер\n\t🙂") == 0
    assert smoke.strangeness("ab\ufffd\x00") == 0.5
    assert smoke.strangeness("\ue000\x1b") == 1
    assert smoke.garble([answer("a\ufffd", agrees=False)], 0.95).verdict == "failed"
    assert smoke.garble([answer("a\ufffd")], 0.95).verdict == "passed"


def test_a_long_prompt_has_to_be_read_whole():
    good = answer(*"abcd")
    assert smoke.long_prompt(good).verdict == "passed"
    good.read = 1
    assert smoke.long_prompt(good).verdict == "failed"
    assert smoke.long_prompt(answer(*"abcd", agrees=False)).verdict == "failed"


def test_answers_at_one_time_may_differ_if_they_are_the_checkpoints_own():
    alone, other = [answer(*"abcd")], [answer(*"abce")]
    assert smoke.concurrency(other, alone, 0.95).verdict == "passed"
    assert smoke.concurrency([answer(*"abce", agrees=False)], alone, 0.95).verdict == "failed"


def test_every_check_is_a_row_of_the_docs():
    text = (Path(__file__).parents[2] / "docs/smoke-test.md").read_text()
    assert re.findall(r"^\| `(\w+)` \|", text, re.MULTILINE) == list(smoke.ALL)


def test_a_check_that_is_missing_or_there_twice_is_an_error():
    checks = [smoke.passed(name, "a", "b") for name in smoke.ALL]
    assert smoke.in_order(checks[::-1]) == checks
    for wrong in (checks[:-1], [*checks, checks[0]]):
        with pytest.raises(RequantError, match="expected"):
            smoke.in_order(wrong)


# What `transformers serve` is asked.


def test_pieces_read_back_as_their_tokens():
    tokenizer = Checkpoint(DEMO / "model").tokenizer()
    smile = tokenizer("a 🙂 b", add_special_tokens=False)["input_ids"]
    (row,) = decisions.rows_of(tokenizer, [[0, *smile]])
    assert row.ids == [0, *smile] and row.ends[-1] == len(row.ids)
    assert row.texts[:2] == ["<|bos|>", "a"] and "🙂" in "".join(row.texts[2:])
    assert len(row.ends) < len(row.ids), "the bytes of one character are one piece"
    for text, start, end in zip(row.texts, [0, *row.ends], row.ends, strict=False):
        assert tokenizer(text, add_special_tokens=False)["input_ids"] == row.ids[start:end]
    (cut,) = decisions.rows_of(tokenizer, [[0, smile[0], smile[2], *smile[:1] * 9]])
    assert cut.ends and len(cut.ids) < 12 or cut.ids[-1] == smile[0]


def test_labels_are_frequent_tokens_that_read_back():
    tokenizer = Checkpoint(DEMO / "model").tokenizer()
    ids = tokenizer("the cat and the dog and the bird", add_special_tokens=False)["input_ids"]
    labels = decisions.choose_labels(tokenizer, [ids, [0] * 50])
    assert 0 not in labels and len(labels) == len(set(labels)) <= decisions.LABELS
    assert ids.count(labels[0]) == max(map(ids.count, ids))
    with pytest.raises(RequantError, match="0 of them are read back"):
        decisions.choose_labels(tokenizer, [[0] * 50])


def test_each_token_is_shown_in_several_contexts():
    tokenizer = Checkpoint(DEMO / "model").tokenizer()
    shown = vocabulary.sample(tokenizer, 100)
    rows = vocabulary.contexts(tokenizer, shown)
    assert len(set(shown)) == 100 and not set(shown) & set(tokenizer.all_special_ids)
    before: dict[int, set[int]] = {}
    for row in rows:
        for previous, token in zip(row, row[1:], strict=False):
            before.setdefault(token, set()).add(previous)
    assert set(before) == set(shown)
    assert sum(len(found) > 1 for found in before.values()) > 95


def test_a_token_that_rounding_moves_has_a_wider_limit_of_its_own():
    noise = dict.fromkeys(range(199), 0.1) | {199: 0.7}
    limits = vocabulary.limits(noise, 1.5)
    assert limits[0] == pytest.approx(0.3) and limits[199] == pytest.approx(2.1)


def test_distances_are_looked_at_expert_by_expert():
    from requant.distances import EVERYWHERE, FEWEST, farthest

    count = 10 * FEWEST
    found = [torch.full((count,), 0.01)]
    reached = torch.zeros(count, dtype=torch.bool)
    reached[:FEWEST] = True
    found[0][:FEWEST] = 0.5
    assert farthest(found, {}) == (pytest.approx(0.01), EVERYWHERE)
    assert farthest(found, {(3, 7): [reached]}) == (pytest.approx(0.5), "tokens of expert 7 of block 3")
    reached[0] = False
    assert farthest(found, {(3, 7): [reached]})[1] == EVERYWHERE, "too few to tell"


def test_the_scale_and_the_experts_of_a_damage_are_the_ones_that_it_says(tmp_path: Path, release):
    from requant.packed import PackedCheckpoint, write_decoded

    write_decoded(release.packed.directory, tmp_path)
    before = PackedCheckpoint(tmp_path)
    name = "model.layers.2.mlp.experts.{}.up_proj.weight"
    old = before.read([name.format(1), name.format(4)])
    damage.double_scale(release.packed, name.format(1).removesuffix(".weight"))(tmp_path)
    damage.swap_experts(2, 1, 4)(tmp_path)
    new = PackedCheckpoint(tmp_path).read([name.format(1), name.format(4)])
    assert torch.equal(new[name.format(4)], old[name.format(1)] / 2)
    assert torch.equal(new[name.format(1)], old[name.format(4)])

"""Each check of the smoke test, on an engine that is right and on one that has just that fault."""

import contextlib
import re
from itertools import accumulate
from pathlib import Path
from types import SimpleNamespace

import damage
import openai_stand_in as stand_in
import pytest
import tiny
import torch
from demo_release import DEMO, DemoRelease, evaluate_record, make_release, reference_text

from requant import decisions, deploy, engine_client, smoke, vocabulary
from requant.checkpoint import Checkpoint
from requant.config import Deploy, Target, Throughput
from requant.distances import Reading, Row, distances, seen_by
from requant.engine_client import TOP, log_probabilities
from requant.errors import RequantError
from requant.hashing import file_entry
from requant.packed import PackedCheckpoint, write_decoded
from requant.records import (
    Check,
    DeployRecord,
    FailedDeployRecord,
    PackRecord,
    ThroughputRecord,
    read_json,
    write_json,
)
from requant.reference_text import RECORDED, first_rows
from requant.replay import Served, agreeing
from requant.safetensors_io import save

ALLOWED = smoke.Allowed(0.95, measured=0.01)
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

    def run(
        *faults: str, damaged: damage.Damage = lambda folder: None, engine: str = "vllm", says: str = "", **keys
    ) -> dict[str, Check]:
        """says: what the engine's log has; keys: of the target."""

        @contextlib.contextmanager
        def serve(target, model, log, threads, linked=()):
            log.write_text(says)
            if target.weights != "decoded":  # as kernels that decode weights do
                write_decoded(model, model.parent / "decoded")
                model = model.parent / "decoded"
            damaged(model)
            with stand_in.serve(model, frozenset(faults), target.context, engine) as server:
                yield server

        monkeypatch.setattr(deploy, "serve_at", serve)
        made = release.folder
        records = (made / "pack.json", made / "evaluate.json", made / "tokens.safetensors")
        outputs = (tmp_path / "served", tmp_path / "log", 1, tmp_path / "deploy.json", tmp_path / "throughput.json")
        target = TARGET.model_copy(update={"engine": engine} | keys)
        try:
            record = deploy.smoke_test("demo", DEMO / "model", made / "model", *records, SETTINGS, target, *outputs)
        except RequantError:
            record = read_json(tmp_path / "deploy.failed.json", FailedDeployRecord)
            assert not (tmp_path / "deploy.json").exists() and not (tmp_path / "throughput.json").exists()
        run.record = record
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


MARLIN = (
    "(EngineCore pid=9) INFO 11-30 12:00:01 [__init__.py:683] Using MarlinNvFp4LinearKernel for NVFP4 GEMM\n"
    "(EngineCore pid=9) INFO 11-30 12:00:01 [nvfp4.py:209] Using 'MARLIN' NvFp4 MoE backend out of potential ones: x\n"
)


def test_an_engine_with_weights_alone_is_held_against_the_chain_without_rounded_activations(run, tmp_path):
    """On sm120, where activations are rounded by the table, an engine says that it has the weights alone."""
    checks = run(says=MARLIN, weights="auto", gpu="sm120")
    assert {name: check.verdict for name, check in checks.items()} == dict.fromkeys(smoke.ALL, "passed")
    record = read_json(tmp_path / "deploy.json", DeployRecord)
    assert record.why_decoded is None and record.arithmetic.rounds == "none"
    assert record.arithmetic.known_from == "the engine's log: Marlin in Linears and MARLIN in experts"
    assert "another model than the one that was evaluated" in record.arithmetic.unlike_evaluated


def test_a_damage_to_an_engine_with_weights_alone_is_seen(run, release):
    """Beside rounded activations it makes no difference: 1.43 times as far off as they are without it, 1.45 with it."""
    broken = damage.double_scale(release.packed, "model.layers.3.mlp.experts.5.down_proj")
    assert smoke.LOG_PROBABILITIES in failed(run(damaged=broken, weights="auto", gpu="sm90"))
    assert run.record.arithmetic.known_from.startswith("vllm 0.26.0 on sm90")


def test_sglang_answers_any_name_and_is_not_blamed(run):
    checks = run("any_name", engine="sglang")
    assert checks[smoke.WRONG_NAME].verdict == "not applicable" and not failed(checks)


def test_sglang_is_asked_for_its_vocabulary_alone_where_it_cannot_encode(run, monkeypatch):
    """Its /tokenize answers with status 500 for a tokenizer that has no model_max_length."""
    assert failed(run("any_name", "no_max_length", engine="sglang")) == {smoke.TOKENIZER}
    of = PackedCheckpoint.tokenizer

    def endless(checkpoint):
        tokenizer = of(checkpoint)
        tokenizer.model_max_length = int(1e30)
        return tokenizer

    monkeypatch.setattr(PackedCheckpoint, "tokenizer", endless)
    asked = ("any_name", "no_max_length")
    assert smoke.TOKENIZER in failed(run(*asked, engine="sglang", damaged=damage.swap_tokens(1043, 777)))
    assert len(run.record.answers) > SETTINGS.prompts and all(answer.agrees for answer in run.record.answers)
    checks = run(*asked, engine="sglang")
    assert not failed(checks) and checks[smoke.TOKENIZER].found.startswith("1101 tokens the same, texts as long")


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


def random_release(folder: Path) -> DemoRelease:
    """A model of random weights, in BF16 as it is packed: six blocks of 32 experts that score alike."""
    changes = {"n_routed_experts": 32, "num_experts_per_tok": 4, "n_group": 1, "topk_group": 1}
    changes |= {"routed_scaling_factor": 2.827, "num_hidden_layers": 6}
    source = tiny.write_checkpoint(folder / "model", "deepseek_v3", **changes)
    tokenizer = Checkpoint(source).tokenizer()
    ids = [id for text in tiny.sentences(120, seed=5) for id in tokenizer(f"<s>{text}")["input_ids"]]
    tokens = torch.tensor(ids[:2048], dtype=torch.int32).view(32, 64)
    save(folder / "tokens.safetensors", {"heldout": tokens, "heldout_mask": torch.ones_like(tokens).byte()})
    files = {path.name: file_entry(path) for path in source.iterdir()}
    counts = dict.fromkeys((name for name, field in PackRecord.model_fields.items() if field.is_required()), 0)
    named = {"release": "demo", "model": "demo", "scheme": "BF16", "multi_token_prediction": "none", "files": files}
    write_json(folder / "pack.json", PackRecord(**counts | named | {"moe_blocks": 5}))
    text = first_rows(tokens, None, RECORDED)
    write_json(folder / "evaluate.json", evaluate_record(reference_text(PackedCheckpoint(source), text)))
    return DemoRelease(folder, "BF16")


def test_a_right_engine_of_a_random_model_passes(tmp_path, monkeypatch):
    """A fifth of its greedy tokens are not the chain's choice, nor would they be by another rounding of it.

    Many of its likeliest tokens are single bytes, which have one text; the engine names tokens by their texts.
    """

    @contextlib.contextmanager
    def serve(target, model, log, threads, linked=()):
        with stand_in.serve(model, frozenset({"splits", "names_by_text"}), target.context) as server:
            yield server

    monkeypatch.setattr(deploy, "serve_at", serve)
    made = random_release(tmp_path / "made").folder
    records = (made / "pack.json", made / "evaluate.json", made / "tokens.safetensors")
    outputs = (tmp_path / "served", tmp_path / "log", 1, tmp_path / "deploy.json", tmp_path / "throughput.json")
    settings, target = (
        SETTINGS.model_copy(update={"prompts": 8, "max_tokens": 6}),
        TARGET.model_copy(update={"weights": "auto"}),
    )
    record = deploy.smoke_test("demo", made / "model", made / "model", *records, settings, target, *outputs)
    assert "failed" not in {check.verdict for check in record.checks}
    checks = {check.name: check for check in record.checks}
    assert checks[smoke.LOG_PROBABILITIES].verdict == "passed" and checks[smoke.LONG_PROMPT].verdict == "passed"
    assert record.agreement < record.agreement_limit, "a fixed limit would fail it"
    assert record.differing > 0.1 and record.agreement >= record.agreement_least


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
    assert smoke.repetition([own, answer("a", "b")], ALLOWED).verdict == "passed"
    check = smoke.repetition([own, foreign], ALLOWED)
    assert check.verdict == "failed" and check.found.startswith("2 of 2 answers end in a loop, 1 by")
    assert check.samples == 2


def test_strange_characters_are_those_that_no_text_has():
    assert smoke.strangeness("Größe, 大きさ, размер\n\t🙂") == 0
    assert smoke.strangeness("ab\ufffd\x00") == 0.5
    assert smoke.strangeness("\ue000\x1b") == 1
    assert smoke.garble([answer(*["a\ufffd"] * 4, agrees=False)], ALLOWED).verdict == "failed"
    assert smoke.garble([answer(*["a\ufffd"] * 4)], ALLOWED).verdict == "passed"
    foreign = answer("a\ufffd", "b")
    foreign.agrees, foreign.unread = [False], True
    assert smoke.garble([foreign], ALLOWED).verdict == "failed", "a text that no token has is nobody's choice"


def some(right: int, of: int) -> list[Served]:
    """Answers of `of` tokens in all, `right` of them the chain's own choice."""
    found = []
    for start in range(0, of, 16):
        count = min(16, of - start)
        found.append(answer(*"abcdefghijklmnop"[:count]))
        found[-1].agrees = [number < right for number in range(start, start + count)]
    return found


def test_a_long_prompt_has_to_be_read_whole():
    good = answer(*"abcd")
    assert smoke.long_prompt([good], ALLOWED).verdict == "passed"
    good.read = 1
    check = smoke.long_prompt([answer(*"abcd"), good], ALLOWED)
    assert check.verdict == "failed" and check.found.startswith("1 of 2 prompt tokens read")
    assert smoke.long_prompt([answer(*"abcd", agrees=False)], ALLOWED).verdict == "failed"


@pytest.mark.parametrize(
    ("right", "of", "verdict"),
    [
        (2, 2, "not applicable"),
        (0, 2, "not applicable"),
        (1, 3, "passed"),
        (0, 3, "failed"),
        (112, 128, "failed"),  # 0.875: 16 wrong ones or more come in 0.0007 of all cases, 15 or more in 0.0019
        (113, 128, "passed"),
        (1913, 2048, "failed"),  # 0.934
        (1914, 2048, "passed"),
    ],
)
def test_a_verdict_is_more_than_chance(right, of, verdict):
    """Each token may be wrong with a probability of 0.05: of three, all are in 0.0001 of all cases, two in 0.007."""
    served = some(right, of)
    checks = [
        smoke.greedy(served, ALLOWED, lambda most: ("without block 1", 0.3))[0],
        smoke.long_prompt(served, ALLOWED),
        smoke.concurrency(served, some(of, of)[:-1] + [answer("other")], ALLOWED),
    ]
    assert [(check.verdict, check.samples) for check in checks] == [(verdict, of)] * 3
    for check in checks:
        assert str(of) in (check.reason or check.found)


def test_near_ties_of_the_model_itself_are_no_fault():
    """Where two right roundings of a model choose otherwise at a tenth of the places, an engine may too; no more."""
    unsteady = smoke.Allowed(0.95, measured=0.1)
    served = some(108, 128)  # 0.844: 20 are wrong
    assert smoke.greedy(served, ALLOWED, lambda most: ("", 0.0))[0].verdict == "failed"
    check = smoke.greedy(served, unsteady, lambda most: ("without block 1", 0.3))[0]
    assert check.verdict == "passed"
    assert check.expected.startswith("0.9 of the tokens or more are this checkpoint's own choice, as of two right")
    assert smoke.greedy(some(90, 128), unsteady, lambda most: ("", 0.0))[0].verdict == "failed"


def test_a_symptom_is_held_against_what_rounding_does():
    """A loop with 3 of 16 tokens other than the chain's is not this model's, though 0.95 of so few would allow it."""
    looping = answer(*["a"] * 16)
    looping.agrees = [number > 2 for number in range(16)]
    assert smoke.greedy([looping], ALLOWED, lambda most: ("without block 1", 0.0))[0].verdict == "passed"
    assert smoke.repetition([looping], ALLOWED).verdict == "failed"
    assert smoke.repetition([looping], smoke.Allowed(0.95, measured=0.1)).verdict == "passed"


def test_what_stands_behind_a_token_that_is_nobodys_counts_as_wrong():
    broken = answer(*"abcdefgh")
    broken.agrees, broken.unread = [True, True, False], True
    assert agreeing([broken]) == (2, 8)
    unknown = answer(*"abcdefgh")
    unknown.agrees = [True, True]  # its ids are not known further, which is no fault of it
    assert agreeing([unknown]) == (2, 2)


def test_a_control_that_fits_too_makes_the_test_blind_and_fails_nothing():
    check, lacks, without = smoke.greedy(some(128, 128), ALLOWED, lambda most: (None, 0.97))
    assert check.verdict == "not applicable" and lacks is None and without == 0.97
    assert "the test is blind" in check.reason and "deploy.prompts" in check.reason


def test_answers_at_one_time_may_differ_if_they_are_the_checkpoints_own():
    alone, other = [answer(*"abcd")], [answer(*"abce")]
    assert smoke.concurrency(other, alone, ALLOWED).verdict == "passed"
    assert smoke.concurrency([answer(*"abce", agrees=False)], alone, ALLOWED).verdict == "failed"
    same = smoke.concurrency(alone, alone, ALLOWED)
    assert same.verdict == "passed" and same.samples == 4


def test_every_check_is_a_row_of_the_docs():
    text = (Path(__file__).parents[2] / "docs/smoke-test.md").read_text()
    assert re.findall(r"^\| `(\w+)` \|", text, re.MULTILINE) == list(smoke.ALL)


def test_a_check_that_is_missing_or_there_twice_is_an_error():
    checks = [smoke.passed(name, "a", "b") for name in smoke.ALL]
    assert smoke.in_order(checks[::-1]) == checks
    for wrong in (checks[:-1], [*checks, checks[0]]):
        with pytest.raises(RequantError, match="expected"):
            smoke.in_order(wrong)


@pytest.mark.parametrize("mark", ["", "\ufffd"])
def test_what_an_engine_shows_of_a_character_that_is_cut_off_is_no_text(monkeypatch, mark):
    """Where an answer ends in the middle of a character, vLLM shows nothing and sglang a mark."""
    texts = ["a", f"a{mark}", f"a{mark}", "a🙂"]

    def stream(client, model, prompt, limit):
        return ["a", "🙂"] if limit == 4 else [texts[limit - 1]], 1, limit

    monkeypatch.setattr(engine_client, "stream", stream)
    answer = engine_client.ask(None, "m", lambda prompt: {"input_ids": [1]}, "p", 4)
    assert answer.steps == ["a", "a", "a", "a🙂"] and answer.shown == texts


def test_an_answer_of_marks_alone_is_garble_and_a_loop():
    marks = ["\ufffd" * (number + 1) for number in range(16)]
    broken = Served("p", [1], [""] * 16, agrees=[False] * 16, read=1, shown=marks)
    assert smoke.garble([broken], ALLOWED).verdict == smoke.repetition([broken], ALLOWED).verdict == "failed"


def test_log_probabilities_that_several_tokens_share_a_name_of_are_not_known():
    """vLLM and sglang have a mapping by text for the largest: of tokens with one text, it has one value."""
    tops = [None, {str(rank): -0.5 * rank for rank in range(TOP)}, {str(rank): -0.5 * rank for rank in range(TOP - 1)}]
    tops.append({str(rank): -0.5 * rank for rank in range(TOP + 1)})  # the text's own token is not among the largest
    given = SimpleNamespace(token_logprobs=[None, -1.5, -2.5, -10.0], top_logprobs=tops)
    sent = {}

    def create(**request):
        sent.update(request)
        return SimpleNamespace(choices=[SimpleNamespace(logprobs=given)])

    found = log_probabilities(
        SimpleNamespace(completions=SimpleNamespace(create=create)), "m", Row([5, 6, 7, 8], [1, 2, 3])
    )
    assert sent["extra_body"] == {"return_tokens_as_token_ids": True} and sent["prompt"] == [5, 6, 7, 8]
    assert found[:, 0].tolist() == [-1.5, -2.5, -10.0]
    assert found.isnan().any(1).tolist() == [False, True, False]
    assert found[2, 1:].tolist() == [-0.5 * rank for rank in range(TOP)]
    chain = torch.zeros(3, 1 + TOP, dtype=torch.float64)
    read = seen_by([found], Reading([], [chain], [[chain + 1]], {}))
    assert distances([found], read.own)[0][1] == 2.5, "of the text's own token alone"
    assert read.noise[0][0].tolist() == [1, 1, 1]


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


def test_the_scale_and_the_experts_of_a_damage_are_the_ones_that_it_says(tmp_path: Path, release):
    write_decoded(release.packed.directory, tmp_path)
    before = PackedCheckpoint(tmp_path)
    name = "model.layers.2.mlp.experts.{}.up_proj.weight"
    old = before.read([name.format(1), name.format(4)])
    damage.double_scale(release.packed, name.format(1).removesuffix(".weight"))(tmp_path)
    damage.swap_experts(2, 1, 4)(tmp_path)
    new = PackedCheckpoint(tmp_path).read([name.format(1), name.format(4)])
    assert torch.equal(new[name.format(4)], old[name.format(1)] / 2)
    assert torch.equal(new[name.format(1)], old[name.format(4)])

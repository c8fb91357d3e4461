"""Benchmarks: the model's own numbers, offline, source and release alike, and no foreign code run."""

import json
import math
from pathlib import Path

import pytest
import tiny_checkpoint as tiny

from requant import benchmark
from requant.checkpoint import Checkpoint
from requant.config import Benchmark
from requant.errors import RequantError
from requant.packed import PackedCheckpoint
from requant.records import BenchmarkRecord, Score, read_json

QUESTIONS = """
task: tiny_questions
dataset_path: json
dataset_kwargs: {data_files: {test: DATA}}
test_split: test
output_type: generate_until
doc_to_text: "{{text}}"
doc_to_target: "{{answer}}"
generation_kwargs: {until: ["."], max_gen_toks: 4, do_sample: false}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
metadata: {version: 1.5}
"""
STORIES = """
task: tiny_stories
dataset_path: json
dataset_kwargs: {data_files: {test: DATA}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list: [{metric: word_perplexity}, {metric: bits_per_byte}]
metadata: {version: 1.0}
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("benchmark")
    rows = [{"text": text, "answer": "cat"} for text in tiny.texts(8, seed=3)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "tasks").mkdir()
    for name, text in (("questions", QUESTIONS), ("stories", STORIES)):
        (folder / "tasks" / f"{name}.yaml").write_text(text.replace("DATA", str(folder / "rows.jsonl")))
    return folder


@pytest.fixture(scope="module")
def settings() -> Benchmark:
    return Benchmark(tasks=["tiny_questions", "tiny_stories"], include_path="tasks", batch_size=4)


@pytest.fixture(scope="module")
def source(folder) -> Path:
    return tiny.make_source(folder / "source")


@pytest.fixture(scope="module")
def source_record(folder, source, settings) -> BenchmarkRecord:
    out = folder / "source.json"
    benchmark.run_benchmark("tiny", Checkpoint(source), "small", settings, folder / "tasks", 1, out)
    return read_json(out, BenchmarkRecord)


def refused(tasks: list[str], folder: Path) -> str:
    """The one line with which `tasks` are refused before any model is loaded."""
    with pytest.raises(RequantError) as raised:
        benchmark.run_benchmark("tiny", None, "small", Benchmark(tasks=tasks), folder, 1, Path("never.json"))
    assert "\n" not in str(raised.value)
    return str(raised.value)


def test_source_scores_are_the_models_own(source, source_record):
    import torch
    from transformers import AutoModelForCausalLM

    scores = {(score.task, score.metric): score for score in source_record.scores}
    assert set(scores) == {
        ("tiny_questions", "exact_match"),
        ("tiny_stories", "word_perplexity"),
        ("tiny_stories", "bits_per_byte"),
    }
    assert all(score.samples == 8 for score in scores.values())
    assert source_record.arithmetic == "BF16 weights and activations"
    assert source_record.settings["task_versions"] == {"tiny_questions": 1.5, "tiny_stories": 1.0}
    assert source_record.source_scores is None and source_record.recovery is None

    model, tokenizer = (
        AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16),
        tiny.tiny_tokenizer(),
    )
    bits, size = 0.0, 0
    for text in tiny.texts(8, seed=3):
        ids = torch.tensor([tokenizer(text)["input_ids"]])
        with torch.no_grad():
            logs = model(ids).logits.float().log_softmax(-1)[0, :-1]
        bits -= float(logs.gather(1, ids[0, 1:, None]).sum()) / math.log(2)
        size += len(text.encode())
    assert scores["tiny_stories", "bits_per_byte"].value == pytest.approx(bits / size, rel=5e-3)
    assert scores["tiny_stories", "bits_per_byte"].stderr > 0


def test_a_release_is_scored_with_its_activations_rounded(folder, source, settings, source_record, monkeypatch):
    packed = PackedCheckpoint(tiny.make_packed(source, folder / "packed"))
    rounded = []
    monkeypatch.setattr(PackedCheckpoint, "round_activations", lambda self, block, prefix, _: rounded.append(prefix))
    out = folder / "release.json"
    record = benchmark.run_benchmark(
        "tiny-nvfp4", packed, "small", settings, folder / "tasks", 1, out, folder / "source.json"
    )
    assert rounded == ["model.layers.0.", "model.layers.1.", "model.layers.2."]
    assert record == read_json(out, BenchmarkRecord)
    assert record.arithmetic.startswith("NVFP4 weights decoded to BF16, inputs of quantized Linears rounded to NVFP4")
    assert record.source_scores == source_record.scores
    mine = {(score.task, score.metric): score.value for score in record.scores}
    theirs = {(score.task, score.metric): score.value for score in source_record.scores}
    key = ("tiny_stories", "bits_per_byte")
    assert record.recovery["tiny_stories/bits_per_byte"] == theirs[key] / mine[key] != 1.0


def test_recovery_is_inverted_where_lower_is_better_and_null_for_zero():
    def record(subject: str, **values: float) -> BenchmarkRecord:
        scores = [
            Score(
                task="t",
                metric=metric,
                higher_is_better=metric != "loss",
                value=value,
                stderr=None,
                samples=3,
            )
            for metric, value in values.items()
        ]
        empty = dict.fromkeys(("source_scores", "recovery"))
        words = dict.fromkeys(("benchmark", "harness", "harness_version", "arithmetic"), "")
        return BenchmarkRecord(
            subject=subject,
            settings={"seed": 1},
            scores=scores,
            seconds=0,
            peak_memory_bytes=0,
            **words,
            **empty,
        )

    source = record("s", right=0.8, loss=2.0, none=0.0)
    assert benchmark.recovery(record("r", right=0.6, loss=2.5, none=0.5), source) == {
        "t/right": pytest.approx(0.75),
        "t/loss": pytest.approx(0.8),
        "t/none": None,
    }
    with pytest.raises(RequantError, match="r: seed: 2; expected 1 as for s"):
        benchmark.recovery(record("r").model_copy(update={"settings": {"seed": 2}}), source)
    with pytest.raises(RequantError, match="s: no score for t/new"):
        benchmark.recovery(record("r", new=1.0), source)


def test_stderr_of_a_ratio_agrees_with_resampling():
    import random

    choose = random.Random(0)
    pairs = [(-choose.uniform(5, 15) * size, size) for size in choose.choices(range(5, 30), k=200)]

    def bits(sample):
        return -sum(a for a, _ in sample) / sum(b for _, b in sample) / math.log(2)

    resampled = [bits(choose.choices(pairs, k=len(pairs))) for _ in range(500)]
    mean = sum(resampled) / len(resampled)
    spread = math.sqrt(sum((value - mean) ** 2 for value in resampled) / (len(resampled) - 1))
    samples = [{"bits_per_byte": pair} for pair in pairs]
    assert benchmark._ratio_stderr("bits_per_byte", bits(pairs), samples) == pytest.approx(spread, rel=0.15)


def test_an_unknown_task_is_named_with_near_matches(folder):
    assert "'tiny_storys'" in (line := refused(["tiny_storys"], folder / "tasks")) and "tiny_stories" in line


def test_tasks_that_run_the_models_code_are_refused(tmp_path, folder):
    assert "marked `unsafe_code`" in refused(["humaneval"], folder / "tasks")
    marked = QUESTIONS.replace("task: tiny_questions", "task: marked\nunsafe_code: true")
    measured = QUESTIONS.replace("exact_match", "code_eval").replace("tiny_questions", "measured")
    hidden = QUESTIONS.replace("tiny_questions", "hidden") + "process_results: !function run.score\n"
    for name, text in (("marked", marked), ("measured", measured), ("hidden", hidden)):
        (tmp_path / f"{name}.yaml").write_text(text)
    (tmp_path / "both.yaml").write_text("group: both\ntask: [marked, hidden]\n")
    (tmp_path / "run.py").write_text("def score(doc, answers):\n    exec(answers[0])\n")
    assert "'marked': marked `unsafe_code`" in refused(["marked"], tmp_path)
    assert "'measured': its metric is code_eval" in refused(["measured"], tmp_path)
    assert "'hidden': run.py has 'exec('" in refused(["hidden"], tmp_path)
    assert "'marked' (in both)" in refused(["both"], tmp_path)


def test_a_task_without_local_data_does_not_reach_for_the_network(tmp_path):
    (tmp_path / "far.yaml").write_text(QUESTIONS.replace("json\n", "openai/gsm8k\n").replace("DATA", "x.jsonl"))
    assert "'tiny_questions': cannot be loaded offline" in refused(["tiny_questions"], tmp_path)


def test_what_scores_depend_on_is_declared(folder, tmp_path):
    tasks = folder / "tasks"
    expected = [str(tasks / "questions.yaml"), str(tasks / "stories.yaml"), str(folder / "rows.jsonl")]
    assert benchmark.task_inputs(tasks) == expected
    assert benchmark.task_inputs(None) == []
    (tmp_path / "code.yaml").write_text("task: t\nprocess_results: !function run.score\ndataset_path: org/name\n")
    assert benchmark.task_inputs(tmp_path) == [str(tmp_path / "code.yaml")]
    (tmp_path / "bad.yaml").write_text("task: [")
    with pytest.raises(RequantError, match=r"bad\.yaml: no YAML"):
        benchmark.task_inputs(tmp_path)


def test_scoring_leaves_no_cache_and_no_setting_behind(folder, source, settings, tmp_path, monkeypatch):
    import os

    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    before = dict(os.environ)
    benchmark.run_benchmark("tiny", Checkpoint(source), "small", settings, folder / "tasks", 1, folder / "again.json")
    assert dict(os.environ) == before
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ cycler.__init__.__globals__.os.getcwd() }}",
        "{{ question.__class__ }}",
        "{{ ('{0.__class__}').format(question) }}",
    ],
)
def test_a_template_of_a_task_reaches_values_alone(tmp_path, template):
    from jinja2.exceptions import SecurityError
    from lm_eval import utils

    (tmp_path / "x.yaml").write_text("task: x\ndataset_path: json\n")
    benchmark.task_manager(["x"], tmp_path)
    doc = {"question": " a b ", "choices": ["c", "d"]}
    with pytest.raises(SecurityError):
        utils.apply_template(template, doc)
    usual = "{{question.strip()|regex_replace('a', 'x')}}: {% for each in choices %}{{each.upper()}}{% endfor %}\n"
    assert utils.apply_template(usual, doc) == "x b: CD\n"


def test_rows_are_read_whatever_their_place_is_called(tmp_path, monkeypatch):
    """Names are no patterns, neither of files nor of the directory that they are in."""
    place = tmp_path / "w [b] * {x} ?"
    (place / "tasks").mkdir(parents=True)
    monkeypatch.chdir(place)
    for name in ("rows.jsonl", "r [1]*.jsonl"):
        (place / name).write_text(json.dumps({"text": name, "answer": "b"}) + "\n")
        (place / "tasks/tiny.yaml").write_text(QUESTIONS.replace("DATA", json.dumps(name)))
        with benchmark.offline():
            manager = benchmark.task_manager(["tiny_questions"], Path("tasks"))
            (task,) = benchmark._load(manager, ["tiny_questions"])
        assert [row["text"] for row in task.test_docs()] == [name]

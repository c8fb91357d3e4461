"""Benchmarks from their published files: lm-eval's own prompts, and one line on a file of another form."""

import json
import shutil
from pathlib import Path

import pytest
from benchmark_data import SHARED, SUBJECTS, lay_out

from requant import published
from requant.benchmark import offline
from requant.config import Served, Target
from requant.errors import RequantError
from requant.sentences import sentence_model
from requant.served_tasks import choose, load_tasks

VLLM = Target(engine="vllm", device="cuda", gpu="sm90")


def asked(name: str, data: Path, target: Target = VLLM) -> dict[str, list[str]]:
    """The prompts of each task of a benchmark."""
    choice = choose(name, Served(), target)
    return {str(task.config.task): prompts(task, choice.num_fewshot) for task in load_tasks(name, choice, data, None)}


def prompts(task, shots: int) -> list[str]:
    task.set_fewshot_seed(42)
    return [task.fewshot_context(row, num_fewshot=shots) for row in task.eval_docs]


def write_hub_copy(folder: Path, configs: dict[str, dict[str, list[dict]]]) -> None:
    """What `datasets` takes for the data set of that name on the hub, where the working directory has it."""
    lines = ["---", "configs:"]
    for config, splits in configs.items():
        lines += [f"- config_name: {config}", "  data_files:"]
        for split, rows in splits.items():
            path = folder / config / f"{split}.jsonl"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
            lines += [f"  - split: {split}", f"    path: {config}/{split}.jsonl"]
    (folder / "README.md").write_text("\n".join([*lines, "---", ""]), encoding="utf-8")


@pytest.mark.parametrize(
    ("name", "repository", "part", "task"),
    [
        ("gsm8k", "openai/gsm8k", "main", "gsm8k"),
        ("mmlu", "cais/mmlu", "anatomy", "mmlu_anatomy"),
        ("math", "EleutherAI/hendrycks_math", "algebra", "minerva_math_algebra"),
        ("ifeval", "google/IFEval", "default", "ifeval"),
        ("humaneval", "openai/openai_humaneval", "default", "humaneval"),
    ],
)
def test_prompts_are_those_of_the_task_as_lm_eval_ships_it(name, repository, part, task, tmp_path, monkeypatch):
    """The shipped task, unchanged, reads a data set in the place of the hub's; ours reads the published files."""
    from lm_eval.api.task import ConfigurableTask
    from lm_eval.tasks import TaskManager

    from requant.served_tasks import _public_tasks

    data = lay_out(name, tmp_path / "data")
    rows = published.rows(name, None if part == "default" else part, data)
    if name == "math":
        rows |= {"train": rows["test"]}
    write_hub_copy(tmp_path / repository, {part: rows})
    monkeypatch.chdir(tmp_path)
    with offline(), sentence_model(1):
        manager: TaskManager = _public_tasks(name)
        if name == "humaneval":  # loading it as it is runs code from the hub
            config = {key: value for key, value in manager.task_index[task].cfg.items() if key != "filter_list"}
            shipped = ConfigurableTask(config=config | {"task": task, "metric_list": [{"metric": "exact_match"}]})
        else:
            shipped = manager.load([task])["tasks"][task]
        shots = choose(name, Served(), VLLM).num_fewshot
        expected = prompts(shipped, shots)
        found = asked(name, data)
    assert len(expected) == 3 and found[task] == expected
    assert all(prompt.count("Question:") == 6 for prompt in expected if name == "gsm8k")


def test_mmlu_is_asked_for_letters_where_an_engine_gives_no_log_probabilities(tmp_path):
    data = lay_out("mmlu", tmp_path / "mmlu", rows=1)
    with offline():
        scored, written = asked("mmlu", data), asked("mmlu", data, Target())
    assert len(scored) == len(written) == 57
    assert written == {f"{task}_generative": asked_for for task, asked_for in scored.items()}
    assert choose("mmlu", Served(chat=True), VLLM).task == "mmlu_generative"


def test_headerless_mmlu_is_the_same(tmp_path):
    headed, plain = lay_out("mmlu", tmp_path / "a", 2), lay_out("mmlu", tmp_path / "b", 2, headerless=True)
    for subject in ("anatomy", "world_religions"):
        assert published.rows("mmlu", subject, headed) == published.rows("mmlu", subject, plain)


@pytest.mark.skipif(not SHARED.is_dir(), reason=f"needs {SHARED}")
def test_all_published_rows_are_read():
    subjects = [path.name.removesuffix("_test.csv") for path in published.files("mmlu", SHARED / "mmlu")[57:]]
    assert sum(len(published.rows("mmlu", subject, SHARED / "mmlu")["test"]) for subject in subjects) == 14042
    assert {split: len(rows) for split, rows in published.rows("gsm8k", "main", SHARED / "gsm8k").items()} == {
        "train": 7473,
        "test": 1319,
    }
    assert len(published.rows("humaneval", None, SHARED / "humaneval")["test"]) == 164
    assert len(published.rows("ifeval", None, SHARED / "ifeval")["train"]) == 541


def test_problems_are_in_the_order_of_their_numbers(tmp_path):
    data = lay_out("math", tmp_path / "math")
    rows = published.rows("math", "geometry", data)["test"]
    assert [row["problem"] for row in rows] == ["What is $0+1$?", "What is $1+1$?", "What is $2+1$?"]
    assert len(published.files("math", data)) == 3 * len(SUBJECTS)


def broken(name: str, part: str | None, data: Path) -> str:
    with pytest.raises(RequantError) as raised:
        published.rows(name, part, data)
    assert "\n" not in str(raised.value)
    return str(raised.value)


def test_a_file_of_another_form_is_named_with_its_line(tmp_path):
    data = lay_out("mmlu", tmp_path / "mmlu", rows=2)
    path = data / "test/anatomy_test.csv"
    path.write_text(path.read_text() + "Why?,a,b,c\n")
    assert "anatomy_test.csv: line 4: 4 columns; expected question" in broken("mmlu", "anatomy", data)
    path.write_text("Why?,a,b,c,d,E\n")
    assert "line 1: answer 'E'; expected A-D, or 0-3" in broken("mmlu", "anatomy", data)
    path.unlink()
    assert "anatomy_test.csv: No such file" in broken("mmlu", "anatomy", data)

    data = lay_out("gsm8k", tmp_path / "gsm8k")
    (data / "test.jsonl").write_text('{"question": "1?"}\n')
    assert "test.jsonl: line 1: no 'answer'; expected an object with question, answer" in broken("gsm8k", None, data)
    (data / "test.jsonl").write_text("{\n")
    assert "test.jsonl: line 1: no JSON" in broken("gsm8k", None, data)
    (data / "test.jsonl").write_text("\n")
    assert "test.jsonl: empty" in broken("gsm8k", None, data)

    data = lay_out("math", tmp_path / "math")
    shutil.rmtree(data / "test/algebra")
    assert "test/algebra: no *.json" in broken("math", "algebra", data)
    with pytest.raises(RequantError, match="nothing of ifeval is there; expected input_data.jsonl"):
        published.files("ifeval", data)
    with pytest.raises(RequantError, match="not there; expected the directory of mmlu's published files"):
        published.files("mmlu", tmp_path / "absent")

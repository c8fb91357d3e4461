"""Tasks that lm-eval has not, and such as run a model's code, are told when a build is planned."""

import pytest

from requant.errors import RequantError
from requant.task_names import check_tasks


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "deep").mkdir()
    (tmp_path / "mine.yaml").write_text("group: many\ntask:\n  - one\n")
    (tmp_path / "deep/one.yaml").write_text('task: "one" # comment\ndataset_path: json\n')
    (tmp_path / "deep/risky.yaml").write_text("task: risky\nunsafe_code: true\n")
    (tmp_path / "like.yaml").write_text("include: deep/risky.yaml\ntask: like\n")
    (tmp_path / "round.yaml").write_text("include: round.yaml\ntask: round\n")
    return tmp_path


def test_tasks_of_ones_own_and_of_lm_eval_are_known(folder):
    check_tasks("k", ["one", "many"], folder)
    check_tasks("k", ["one", "gsm8k", "mmlu", "minerva_math", "mmlu_abstract_algebra", "ifeval"], folder)
    check_tasks("k", ["gsm8k", "hellaswag"], None)


def test_a_task_that_runs_a_models_code_is_refused(folder):
    with pytest.raises(
        RequantError, match=r"benchmarks\.b\.tasks: 'risky' runs code that the model wrote .* risky\.yaml"
    ):
        check_tasks("benchmarks.b.tasks", ["one", "risky"], folder)
    with pytest.raises(RequantError, match=r"k: 'like' runs code that the model wrote .* in risky\.yaml\)"):
        check_tasks("k", ["round", "like"], folder)
    for task in ("humaneval", "mbpp", "humaneval_instruct", "humaneval_plus", "mbpp_plus_instruct"):
        with pytest.raises(RequantError, match=f"k: '{task}' runs code that the model wrote"):
            check_tasks("k", [task], None)


def test_an_unknown_task_is_told_with_the_nearest(folder):
    with pytest.raises(RequantError, match=r"k: benchmark task 'gsm8kk': neither in lm-eval .* perhaps gsm8k"):
        check_tasks("k", ["one", "gsm8kk"], folder)

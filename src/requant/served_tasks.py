"""Which lm-eval tasks a benchmark of `served` is, and their rows: lm-eval's prompts and filters, whatever the data.

An engine that gives no log-probabilities of a text (transformers), and every chat endpoint, is asked to write the
letter of an answer instead (lm-eval's `mmlu_generative`). A benchmark of many tasks is scored over all their rows.
"""

import importlib.metadata
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from requant import published
from requant.benchmark import prepare_harness, refuse_code_execution, task_configs, task_manager
from requant.config import PUBLIC, Served, Target
from requant.errors import RequantError, plain

if TYPE_CHECKING:
    from lm_eval.api.task import Task
    from lm_eval.tasks import TaskManager

GIVE_LOGPROBS = ("vllm", "sglang")  # engines whose completions have the log-probabilities of the prompt (`echo`)


@dataclass(frozen=True)
class Form:
    """A way to ask: lm-eval's task, and the score that is the benchmark's."""

    task: str
    metric: str


@dataclass(frozen=True)
class Convention:
    """How a benchmark is usually measured."""

    by_generation: Form
    by_likelihood: Form | None = None
    num_fewshot: int = 0
    chat: bool = False


CONVENTIONS = {
    "mmlu": Convention(Form("mmlu_generative", "exact_match (get_response)"), Form("mmlu", "acc"), num_fewshot=5),
    "gsm8k": Convention(Form("gsm8k", "exact_match (strict-match)"), num_fewshot=5),
    "math": Convention(Form("minerva_math", "exact_match"), num_fewshot=4),
    "humaneval": Convention(Form("humaneval", "pass@1")),
    "ifeval": Convention(Form("ifeval", "prompt_level_strict_acc"), chat=True),
}
assert tuple(CONVENTIONS) == PUBLIC
# Of lm_eval/tasks: where the tasks of each lie.
FOLDERS = {
    "mmlu": ("mmlu/default", "mmlu/generative"),
    "gsm8k": ("gsm8k",),
    "math": ("minerva_math", "benchmarks"),
    "humaneval": ("humaneval",),
    "ifeval": ("ifeval",),
}


@dataclass(frozen=True)
class Choice:
    """What is run: lm-eval's task, the score to give (None: the task's first), and how it is asked."""

    task: str
    metric: str | None
    num_fewshot: int | None
    chat: bool


def choose(name: str, settings: Served, target: Target) -> Choice:
    """What benchmark `name` is at a target whose engine may give no log-probabilities."""
    if name not in CONVENTIONS:
        return Choice(str(settings.task), settings.metric, settings.num_fewshot, asks_by_chat(name, settings))
    convention, chat = CONVENTIONS[name], asks_by_chat(name, settings)
    by_likelihood = convention.by_likelihood if target.engine in GIVE_LOGPROBS and not chat else None
    form = by_likelihood or convention.by_generation
    shots = convention.num_fewshot if settings.num_fewshot is None else settings.num_fewshot
    return Choice(form.task, settings.metric or form.metric, shots, chat)


def asks_by_chat(name: str, settings: Served) -> bool:
    """Whether benchmark `name` is asked through the chat template."""
    convention = CONVENTIONS.get(name)
    return bool(convention is not None and convention.chat if settings.chat is None else settings.chat)


def needs_network(name: str, settings: Served) -> bool:
    """Whether the rows come from the hub."""
    return name in CONVENTIONS and settings.data is None


def load_tasks(
    name: str,
    choice: Choice,
    data: Path | None,
    folder: Path | None,
    passes: Callable[[dict[str, Any], str], bool] | None = None,
) -> "list[Task]":
    """lm-eval's tasks of a benchmark, their rows read: from `data`, else from where lm-eval has them.

    folder: where the files of tasks of one's own lie. passes: whether a program of HumanEval passes its tests, run
    where nothing can be harmed. Raises RequantError for a task that is unknown, can't be loaded, or would run code
    in this process.
    """
    manager = _public_tasks(name) if name in CONVENTIONS else task_manager([choice.task], folder)
    if name == "humaneval":
        return [_humaneval(manager, data, passes)]
    refuse_code_execution(manager, [choice.task])
    try:
        if data is None:
            return list(manager.load([choice.task])["tasks"].values())
        return _with_rows(manager, name, choice.task, data)
    except RequantError:
        raise
    except Exception as error:  # lm-eval, datasets and the hub's client raise whatever their parts raise
        raise RequantError(
            f"{name}: lm-eval's task {choice.task!r} can't be loaded: {type(error).__name__}: {plain(error)}; expected "
            "its rows from the hub, or in the directory that `data` names"
        ) from error


def check_answerable(name: str, tasks: "list[Task]", choice: Choice, target: Target) -> None:
    """RequantError if a task needs log-probabilities that the target's engine does not give."""
    for task in tasks:
        if task.OUTPUT_TYPE != "generate_until" and (choice.chat or target.engine not in GIVE_LOGPROBS):
            asked = "its chat endpoint" if choice.chat else f"engine {target.engine}"
            raise RequantError(
                f"{name}: task {task.config.task!r} is of type {task.OUTPUT_TYPE}, and {asked} gives no "
                f"log-probabilities of a text; expected a task of type generate_until, or `chat: false` and one of "
                f"{', '.join(GIVE_LOGPROBS)}"
            )


def source_of_rows(name: str, tasks: "list[Task]", data: Path | None) -> str:
    """Where the rows come from, in words."""
    if data is not None:
        return f"{data}: {len(published.files(name, data))} files"
    found = sorted({str(task.config.dataset_path) for task in tasks})
    if name in CONVENTIONS:
        return f"the hub: {', '.join(found)}"
    return "the files that the task names" if found == ["json"] else ", ".join(found)


def _public_tasks(name: str) -> "TaskManager":
    """The index of lm-eval's tasks of one benchmark: reading all 12,000 files takes a while."""
    import lm_eval.tasks
    from lm_eval.tasks import TaskManager

    prepare_harness()
    own = Path(lm_eval.tasks.__file__).parent
    return TaskManager(include_path=[own / folder for folder in FOLDERS[name]], include_defaults=False)


def _with_rows(manager: "TaskManager", name: str, task: str, data: Path) -> "list[Task]":
    """The tasks that `task` stands for, each with the rows of its part of `data` in place of its data set."""
    leaves = list(dict.fromkeys(leaf for leaf, _ in task_configs(manager, task) if leaf in manager.all_subtasks))
    members = [{"task": leaf, "custom_dataset": _reader(name, _part(manager, leaf), data)} for leaf in leaves]
    return list(manager.load([{"group": f"requant_{name}", "task": members}])["tasks"].values())


def _part(manager: "TaskManager", leaf: str) -> str | None:
    """What a task calls its part of the data set: `dataset_name`, its own or of the file that it includes."""
    from lm_eval.tasks._yaml_loader import load_yaml

    config = load_yaml(manager.task_index[leaf].yaml_path, resolve_func=False, recursive=True)
    return config.get("dataset_name")


def _reader(name: str, part: str | None, data: Path) -> Callable[..., Any]:
    def read(**_: Any) -> Any:
        from datasets import Dataset, DatasetDict

        splits = published.rows(name, part, data)
        return DatasetDict({split: Dataset.from_list(rows) for split, rows in splits.items()})

    return read


def _humaneval(
    manager: "TaskManager", data: Path | None, passes: Callable[[dict[str, Any], str], bool] | None
) -> "Task":
    """lm-eval's HumanEval with its prompt, stop strings and settings, scored by `passes`.

    Its own scoring runs what the model wrote in the process that asks for it, and fetches that code from the hub.
    """
    from lm_eval.api.task import ConfigurableTask

    config = dict(manager.task_index["humaneval"].cfg)
    del config["unsafe_code"], config["filter_list"]
    config |= {"task": "humaneval", "process_results": _judged_by(passes)}
    config["metric_list"] = [{"metric": "pass@1", "aggregation": "mean", "higher_is_better": True}]
    if data is not None:
        config["custom_dataset"] = _reader("humaneval", None, data)
    return ConfigurableTask(config=config)


def _judged_by(passes: Callable[[dict[str, Any], str], bool] | None) -> Callable[[dict, list[str]], dict[str, float]]:
    def judge(doc: dict[str, Any], answers: list[str]) -> dict[str, float]:
        if passes is None:
            raise RequantError(
                "humaneval: no sandbox was given; expected one: the model's code is not run outside of it"
            )
        return {"pass@1": float(passes(doc, answers[0]))}

    return judge


def versions(tasks: "list[Task]") -> dict[str, str]:
    """{lm-eval's task: its version}."""
    return {str(task.config.task): str((task.config.metadata or {}).get("version")) for task in tasks}


def harness() -> tuple[str, str]:
    """(the harness, its version)."""
    return "lm-eval", importlib.metadata.version("lm-eval")

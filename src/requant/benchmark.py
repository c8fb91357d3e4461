"""Scores of a model on lm-eval tasks: the source and its releases under the same settings, offline.

Quantized activations are computed as the release's format says, so that a W4A4 release is not scored as if it
were W4A16. Tasks that run code which the model wrote are refused: this process has the user's rights.
"""

import contextlib
import difflib
import functools
import glob
import importlib.metadata
import math
import os
import re
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from requant import fp8
from requant.config import Benchmark
from requant.dtypes import main_dtype
from requant.errors import RequantError
from requant.jobs import peak_memory_bytes, progress
from requant.records import BenchmarkRecord, Score, read_json, write_json
from requant.serving import unwinding_on_sigterm

if TYPE_CHECKING:
    from lm_eval.tasks import TaskManager

    from requant.checkpoint import Checkpoint

BOOTSTRAP_RESAMPLES = 1000  # for the standard error of metrics that have no closed form, such as F1
STDERR_TEXT = "lm-eval's; of perplexities and bits per byte the delta method over documents, which lm-eval leaves out"
LOCAL_DATA = ("json", "csv", "text", "parquet", "arrow")  # values of `dataset_path` that read local files
# What a task's own Python does to run text as a program.
_RUNS_TEXT = re.compile(
    r"(?<![\w.])(?:exec|eval)\(|code_eval|parse_expr\(|sympify\(|\bsubprocess\b|os\.(?:system|popen)\("
)


def run_benchmark(
    subject: str,
    checkpoint: "Checkpoint",
    name: str,
    settings: Benchmark,
    task_folder: Path | None,
    threads: int,
    out: Path,
    source_record: Path | None = None,
    device: str = "cpu",
) -> BenchmarkRecord:
    """Scores `checkpoint` on the tasks of benchmark `name`; with the source model's record also the recovery.

    `task_folder` is where `settings.include_path` lies. The whole model is in memory. Raises RequantError for
    a task that is unknown, has no local data or runs code that a model wrote, and for a source that was
    measured with other settings.
    """
    import torch

    started = time.monotonic()
    torch.set_num_threads(threads)
    with unwinding_on_sigterm(), offline():
        manager = task_manager(settings.tasks, task_folder)
        refuse_code_execution(manager, settings.tasks)
        tasks = _load(manager, settings.tasks)
        progress(f"{subject}: loading the model")
        model, arithmetic = _whole_model(checkpoint, device)
        progress(f"{subject}: scoring {', '.join(settings.tasks)} ({arithmetic})")
        results = _evaluate(model, checkpoint.tokenizer(), manager, tasks, settings)
    scores = _scores(results, settings.tasks, manager)
    for score in scores:
        error = "" if score.stderr is None else f" +- {score.stderr:.4f}"
        progress(f"{subject}: {score.task} {score.metric}: {score.value:.4f}{error} ({score.samples} samples)")
    versions = {task: results["versions"].get(task) for task in sorted(results["n-samples"])}
    record = BenchmarkRecord(
        subject=subject,
        benchmark=name,
        harness="lm-eval",
        harness_version=importlib.metadata.version("lm-eval"),
        settings=settings.model_dump(exclude={"hub", "served"}) | {"task_versions": versions, "stderr": STDERR_TEXT},
        arithmetic=arithmetic,
        scores=scores,
        source_scores=None,
        recovery=None,
        seconds=time.monotonic() - started,
        peak_memory_bytes=peak_memory_bytes(),
        device=device,
    )
    if source_record is not None:
        source = read_json(source_record, BenchmarkRecord)
        record = record.model_copy(update={"source_scores": source.scores, "recovery": recovery(record, source)})
    write_json(out, record)
    return record


def task_inputs(task_folder: Path | None) -> list[str]:
    """Files that scores depend on: all under `task_folder`, and the local data that its task files name.

    RequantError naming a task file that is no YAML.
    """
    import yaml

    class Tolerant(yaml.SafeLoader):
        """Reads task files without importing what their `!function` tags name."""

    Tolerant.add_multi_constructor("!", lambda loader, suffix, node: None)
    if task_folder is None:
        return []
    files = sorted(path for path in task_folder.rglob("*") if path.is_file() and "__pycache__" not in path.parts)
    data: set[str] = set()
    for path in (path for path in files if path.suffix == ".yaml"):
        try:
            task = yaml.load(path.read_text(encoding="utf-8"), Tolerant) or {}
        except yaml.YAMLError as error:
            reason = " ".join(str(error).split())
            raise RequantError(f"{path}: no YAML: {reason}; expected an lm-eval task file") from None
        if task.get("dataset_path") in LOCAL_DATA:
            data.update(_strings((task.get("dataset_kwargs") or {}).get("data_files")))
    return [*map(str, files), *sorted(data)]


def recovery(record: BenchmarkRecord, source: BenchmarkRecord) -> dict[str, float | None]:
    """By task/metric how much of the source's score is left: 1 is all of it, also where lower is better.

    None where the source scores 0. RequantError unless both were measured with the same settings.
    """
    for key, value in source.settings.items():
        if record.settings.get(key) != value:
            raise RequantError(
                f"{record.subject}: {key}: {record.settings.get(key)!r}; expected {value!r} as for "
                f"{source.subject}: score both with the same settings"
            )
    before = {(score.task, score.metric): score.value for score in source.scores}
    missing = sorted({(score.task, score.metric) for score in record.scores} - set(before))
    if missing:
        name = "/".join(missing[0])
        raise RequantError(f"{source.subject}: no score for {name}; expected one: score the source again")
    return {
        f"{score.task}/{score.metric}": _recovered(score, before[score.task, score.metric]) for score in record.scores
    }


def _recovered(score: Score, source: float) -> float | None:
    part, whole = (score.value, source) if score.higher_is_better else (source, score.value)
    return part / whole if source and whole else None


def task_manager(tasks: list[str], folder: Path | None) -> "TaskManager":
    """The index of tasks: the files under `folder`, and lm-eval's own unless the former have all of `tasks`.

    RequantError naming near matches for a task that neither has. From then on `prepare_harness` holds.
    """
    from lm_eval.tasks import TaskManager

    prepare_harness()
    if folder is not None and not folder.is_dir():
        raise RequantError(f"include_path: {folder}: not there; expected a directory of task files")
    if folder is not None:
        local = TaskManager(include_path=folder, include_defaults=False)
        if set(tasks) <= set(local.all_subtasks):  # reading lm-eval's 12,000 task files takes a while
            return local
    manager = TaskManager(include_path=folder)
    for task in tasks:
        if task not in manager.task_index:
            near = " or ".join(difflib.get_close_matches(task, manager.all_tasks, n=3, cutoff=0.5))
            raise RequantError(
                f"benchmark task {task!r}: neither in lm-eval {importlib.metadata.version('lm-eval')} nor in "
                f"{folder or 'an include_path'}; expected the name of a task{near and f', perhaps {near}'}"
            )
    return manager


def prepare_harness() -> None:
    """Has lm-eval take templates and files of tasks for no more than they are, from now on in this process."""
    _confine_templates()
    _take_files_literally()


def _confine_templates() -> None:
    """Templates of tasks reach values alone: neither attributes of Python's own, nor through them the interpreter."""
    from jinja2.sandbox import SandboxedEnvironment
    from lm_eval import utils

    if not isinstance(utils.env, SandboxedEnvironment):
        confined = SandboxedEnvironment(
            loader=utils.env.loader,
            undefined=utils.env.undefined,
            keep_trailing_newline=utils.env.keep_trailing_newline,
        )
        confined.filters |= utils.env.filters
        utils.env = confined


def _take_files_literally() -> None:
    """Data files are read in a directory with brackets or stars in its path, and have them in their names."""
    from lm_eval.api.task import ConfigurableTask

    download = ConfigurableTask.download

    @functools.wraps(download)
    def literal(self, dataset_kwargs: dict[str, Any] | None = None, **settings: Any) -> None:
        files = (dataset_kwargs or {}).get("data_files")
        named = {"data_files": _escaped(files)} if files else {}
        return download(self, {**dataset_kwargs, **named} if dataset_kwargs else dataset_kwargs, **settings)

    if not hasattr(download, "__wrapped__"):
        ConfigurableTask.download = literal


def _escaped(files: Any) -> Any:
    """Names of files as `datasets` takes them, which reads names, and the directory that they are in, as patterns."""
    if isinstance(files, dict):
        return {split: _escaped(named) for split, named in files.items()}
    if isinstance(files, list):
        return [_escaped(name) for name in files]
    if isinstance(files, str) and os.path.exists(files) and glob.has_magic(os.path.abspath(files)):
        return glob.escape(os.path.abspath(files))
    return files


def refuse_code_execution(manager: "TaskManager", tasks: list[str]) -> None:
    """RequantError naming a task (or one within a group) that would run what the model wrote."""
    for task in tasks:
        for name, config in task_configs(manager, task):
            reason = _code_execution(config)
            if reason:
                within = "" if name == task else f" (in {task})"
                raise RequantError(
                    f"benchmark task {name!r}{within}: {reason}: it runs code that the model wrote; expected "
                    "a task that only compares text: run this one yourself, in a sandbox"
                )


def task_configs(manager: "TaskManager", name: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """(name, configuration) of each task that `name`, a task, a group or a tag, stands for."""
    entry = manager.task_index.get(name)
    if entry is None:
        return
    config = entry.cfg or {}
    members = config.get("task") if entry.kind.name == "GROUP" else None
    if entry.kind.name == "TAG":
        members = sorted(entry.tags)
    if members is None:
        yield name, config
        return
    yield from _member_configs(manager, name, members)


def _member_configs(
    manager: "TaskManager", group: str, members: list[str | dict[str, Any]]
) -> Iterator[tuple[str, dict[str, Any]]]:
    """As `task_configs` of what a group lists: names, a task with settings of its own, groups written out in place."""
    for member in members:
        inner = member if isinstance(member, str) else member.get("task") or member.get("group")
        if isinstance(inner, list):
            yield from _member_configs(manager, group, inner)
            continue
        if isinstance(member, dict):
            yield str(inner), member
        if isinstance(inner, str) and inner != group:
            yield from task_configs(manager, inner)


def _code_execution(config: dict[str, Any]) -> str | None:
    """Why a task of this (unresolved) configuration counts as running code; None if it does not."""
    if config.get("unsafe_code"):
        return "marked `unsafe_code`"
    for value in _strings(config):
        if value.endswith("code_eval"):
            return "its metric is code_eval"
        module = Path(f"{value.rpartition('.')[0]}.py")  # `!function utils.f` reads DIRECTORY/utils.f here
        if module.is_absolute() and module.is_file():
            found = _RUNS_TEXT.search(module.read_text(encoding="utf-8"))
            if found:
                return f"{module.name} has {found[0]!r}"
    return None


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for inner in value.values():
            yield from _strings(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _strings(inner)


def _load(manager: "TaskManager", names: list[str]) -> list[Any]:
    """lm-eval's task and group objects, their data read."""
    loaded = []
    for name in names:
        try:
            found = manager.load([name])
        except Exception as error:  # lm-eval and datasets raise whatever their parts raise
            first = (str(error).splitlines() or [""])[0]
            raise RequantError(
                f"benchmark task {name!r}: cannot be loaded offline: {type(error).__name__}: {first}; "
                "expected its data in local files: a task file with `dataset_path: json` names them"
            ) from error
        groups = found.get("groups", {})
        loaded += [groups[name]] if name in groups else list(found["tasks"].values())
    return loaded


def _whole_model(checkpoint: "Checkpoint", device: str) -> tuple[Any, str]:
    """The model, and in words how it computes."""
    from requant.streamed import StreamedModel

    scheme = getattr(checkpoint, "scheme", None)
    if scheme is None or not scheme.quantizes:
        model = StreamedModel(checkpoint, device)
        main = main_dtype(checkpoint.described(checkpoint.in_blocks(0, model.blocks)).values())
        arithmetic = "BF16 weights and activations"
        if fp8.block_size(checkpoint.config) is not None:
            arithmetic = "FP8 weights decoded to BF16, BF16 activations"
        elif main != "BF16":
            arithmetic = f"{main} weights rounded to BF16, BF16 activations"
        return model.whole(), arithmetic
    weights = f"{scheme.name} weights decoded to BF16"
    if not scheme.quantizes_activations:
        return StreamedModel(checkpoint, device).whole(), f"{weights}, BF16 activations"
    model = StreamedModel(checkpoint, device).whole(quantize_activations=True)
    return model, f"{weights}, inputs of quantized Linears rounded to {scheme.name}, products in BF16"


def _evaluate(model: Any, tokenizer: Any, manager: "TaskManager", tasks: list[Any], settings: Benchmark) -> dict:
    """lm-eval's results."""
    import lm_eval
    from lm_eval.models.huggingface import HFLM

    class OneBeginning(HFLM):
        """Begins a text with BOS once.

        lm-eval's perplexities begin it twice, and count the second one as text, where the tokenizer adds BOS
        by itself (EleutherAI/lm-evaluation-harness issue 3333).
        """

        def loglikelihood_rolling(self, requests, disable_tqdm=False):
            self.add_bos_token = False  # it is the prefix token already
            try:
                return super().loglikelihood_rolling(requests, disable_tqdm)
            finally:
                self.add_bos_token = None

    return lm_eval.simple_evaluate(
        model=OneBeginning(
            pretrained=model, tokenizer=tokenizer, batch_size=settings.batch_size, trust_remote_code=False
        ),
        tasks=tasks,
        task_manager=manager,
        num_fewshot=settings.num_fewshot,
        limit=settings.limit,
        bootstrap_iters=BOOTSTRAP_RESAMPLES,
        random_seed=settings.seed,
        numpy_random_seed=settings.seed,
        torch_random_seed=settings.seed,
        fewshot_random_seed=settings.seed,
        confirm_run_unsafe_code=False,
    )


def _scores(results: dict, names: list[str], manager: "TaskManager") -> list[Score]:
    """The scores of each asked task; of a group its aggregate, or its tasks' scores if it has none."""
    aggregated = results.get("groups", {})
    scores = []
    for name in names:
        tasks = [name] if name in aggregated or name in results["n-samples"] else _members(results, name, manager)
        for task in tasks:
            scores += _task_scores(results, task, {**results["results"], **aggregated}[task])
    return scores


def _members(results: dict, name: str, manager: "TaskManager") -> list[str]:
    return sorted({task for task, _ in task_configs(manager, name)} & set(results["n-samples"]))


def _task_scores(results: dict, task: str, metrics: dict[str, Any]) -> list[Score]:
    members = results["group_subtasks"].get(task, [task])
    samples = sum(results["n-samples"][member]["effective"] for member in _leaves(results, members))
    scores = []
    for key, value in metrics.items():
        metric, _, filter_name = key.partition(",")
        if not filter_name or metric.endswith("_stderr"):
            continue
        if not isinstance(value, int | float) or not math.isfinite(value):
            raise RequantError(f"benchmark task {task!r}: {metric}: {value!r}; expected a finite number")
        stderr = metrics.get(f"{metric}_stderr,{filter_name}")
        if not isinstance(stderr, int | float):
            stderr = _ratio_stderr(metric, float(value), results.get("samples", {}).get(task, []))
        higher = results["higher_is_better"].get(task, {}).get(metric)
        scores.append(
            Score(
                task=task,
                metric=metric if filter_name == "none" else f"{metric} ({filter_name})",
                higher_is_better=higher is not False,
                value=float(value),
                stderr=None if stderr is None or not math.isfinite(stderr) else float(stderr),
                samples=_covered(results, task, metric, filter_name) or samples,
            )
        )
    return scores


def _covered(results: dict, task: str, metric: str, filter_name: str) -> int:
    """Rows of a task that a metric covers: one that scores a kind of question leaves out the others."""
    logged = results.get("samples", {}).get(task, [])
    return sum(metric in sample and sample.get("filter", filter_name) == filter_name for sample in logged)


def _leaves(results: dict, members: list[str]) -> Iterator[str]:
    for member in members:
        if member in results["n-samples"]:
            yield member
        else:
            yield from _leaves(results, results["group_subtasks"].get(member, []))


def _ratio_stderr(metric: str, value: float, samples: list[dict]) -> float | None:
    """Standard error of a function of sum(log-likelihoods) / sum(words or bytes) over independent documents.

    Delta method (Cochran, Sampling Techniques, 6.4): the ratio r = sum(a) / sum(b) has the variance
    sum((a - r b)^2) / (n (n - 1) mean(b)^2); exp(-r) and -r / ln 2 have it times their derivative squared.
    """
    slopes = {"word_perplexity": value, "byte_perplexity": value, "bits_per_byte": 1 / math.log(2)}
    pairs = [sample[metric] for sample in samples if metric in sample]
    if metric not in slopes or len(pairs) < 2:
        return None
    total = sum(weight for _, weight in pairs)
    ratio = sum(likelihood for likelihood, _ in pairs) / total
    squares = sum((likelihood - ratio * weight) ** 2 for likelihood, weight in pairs)
    return slopes[metric] * math.sqrt(squares / (1 - 1 / len(pairs))) / total


@contextlib.contextmanager
def offline() -> Iterator[None]:
    """No network for the libraries below, a data set cache of this run's own, one process.

    Both libraries read their environment when they are imported: modules that are there already are told too.
    """
    with tempfile.TemporaryDirectory(prefix="requant-datasets-") as folder:
        wanted = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_EVALUATE_OFFLINE": "1"}
        wanted |= {
            "HF_DATASETS_CACHE": folder,
            "HF_MODULES_CACHE": f"{folder}/modules",
            "DISABLE_MULTIPROC": "1",
        }
        wanted |= {"HF_DATASETS_DISABLE_PROGRESS_BARS": "1", "TOKENIZERS_PARALLELISM": "false"}
        attributes = (
            ("huggingface_hub.constants", "HF_HUB_OFFLINE", True),
            ("datasets.config", "HF_HUB_OFFLINE", True),
            ("datasets.config", "HF_DATASETS_OFFLINE", True),
            ("datasets.config", "HF_DATASETS_CACHE", Path(folder)),
        )
        kept = {name: os.environ.get(name) for name in wanted}
        loaded = [(sys.modules[module], name, value) for module, name, value in attributes if module in sys.modules]
        before = [(module, name, getattr(module, name)) for module, name, _ in loaded]
        os.environ.update(wanted)
        for module, name, value in loaded:
            setattr(module, name, value)
        try:
            yield
        finally:
            for module, name, value in before:
                setattr(module, name, value)
            for name, value in kept.items():
                os.environ.pop(name, None) if value is None else os.environ.update({name: value})

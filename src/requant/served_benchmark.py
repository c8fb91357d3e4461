"""Benchmarks of a served model: what the engine of a target answers, scored by lm-eval, row by row.

`measure` serves a checkpoint and writes its scores, with those of each row in a file of their own. A job that was
killed goes on with the answers it has.
"""

import contextlib
import dataclasses
import hashlib
import json
import math
import random
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from requant import engine_log, paired
from requant.answer_log import AnswerLog
from requant.arithmetic import observed
from requant.benchmark import BOOTSTRAP_RESAMPLES, offline
from requant.config import Sandbox, Served, Target
from requant.engines import serve_at
from requant.errors import RequantError, plain
from requant.hashing import file_entry
from requant.jobs import progress
from requant.records import (
    FileEntry,
    Score,
    ServedMeasurement,
    write_json,
    write_text,
)
from requant.schemes import Scheme
from requant.served_copy import linked_files, served_copy
from requant.served_model import client, past_proxies
from requant.served_tasks import (
    Choice,
    check_answerable,
    choose,
    harness,
    load_tasks,
    needs_network,
    source_of_rows,
    versions,
)
from requant.serving import Server, trouble, unwinding_on_sigterm

SAME = 1e-9  # between lm-eval's score and that over the rows: sums in another order


@dataclass
class Subject:
    """A checkpoint to be served: the files `files` of `directory`, decoded to BF16 if there is a reason to.

    scheme: of a release.
    """

    name: str
    directory: Path
    files: dict[str, FileEntry]
    why_decoded: str | None = None
    scheme: Scheme | None = None


@dataclass
class Row:
    """A row's results by (metric, filter), one for each repeat, and what the model answered."""

    key: str
    prompt: str
    results: dict[tuple[str, str], list[Any]] = field(default_factory=lambda: defaultdict(list))
    answers: list[Any] = field(default_factory=list)


def measure(
    subject: Subject,
    benchmark: str,
    name: str,
    settings: Served,
    target_name: str,
    target: Target,
    task_folder: Path | None,
    data: Path | None,
    scratch: Path,
    server_log: Path,
    threads: int,
    out: Path,
    samples: Path,
    sandbox: Sandbox,
) -> ServedMeasurement:
    """Serves `subject` at `target` and scores its answers to benchmark `name` of the section `benchmark`.

    task_folder: where tasks of one's own lie. data: the benchmark's published files. scratch: holds what is served
    meanwhile. sandbox: where programs of the model run. `samples` gets a line a row. Answers lie beside `out` until it
    is there. Raises RequantError if a task can't be loaded or not be asked there, or if the engine does not answer.
    """
    started = time.monotonic()
    choice = choose(name, settings, target)
    with contextlib.ExitStack() as stack:
        stack.enter_context(unwinding_on_sigterm())
        stack.enter_context(past_proxies())
        if not needs_network(name, settings):
            stack.enter_context(offline())
        sentences = stack.enter_context(_sentences(name, settings.seed))
        passes, ran_in = _sandbox(name, sandbox)
        tasks = load_tasks(name, choice, data, task_folder, passes)
        check_answerable(name, tasks, choice, target)
        model = stack.enter_context(
            served_copy(subject.directory, sorted(subject.files), scratch, subject.why_decoded is not None)
        )
        if choice.chat and target.engine == "transformers":  # others have templates of their own for some models
            _check_chat(name, subject, model)
        progress(f"{subject.name}: {name}: starting the engine (log: {server_log})")
        server = stack.enter_context(serve_at(target, model, server_log, threads, linked=linked_files(model)))
        depends_on = {
            "checkpoint": {file: entry.sha256 for file, entry in subject.files.items()},
            "settings": settings.model_dump(mode="json", exclude={"expected", "source", "metric", "limit", "data"}),
            "engine": [server.engine, server.version, server.command, server.environment, subject.why_decoded],
        }
        answers = AnswerLog(out.with_name(f".{out.stem}.answers.jsonl"), depends_on, f"{subject.name}: {name}")
        stack.callback(answers.close)
        context = target.context or _context(model)
        rows, runs = _ask(subject.name, name, tasks, choice, settings, server, model, target, context, answers)
    computed = None
    if subject.scheme is not None:
        computed = observed(subject.scheme, target, subject.why_decoded is not None, engine_log.read(server_log))
    scores = _scores(name, rows, runs, tasks)
    write_text(samples, "".join(map(_line, rows)))
    shots = {task.config.num_fewshot or 0 for task in tasks}
    record = ServedMeasurement(
        subject=subject.name,
        benchmark=benchmark,
        name=name,
        tasks=versions(tasks),
        method="generation" if all(task.OUTPUT_TYPE == "generate_until" for task in tasks) else "log-likelihood",
        chat_template=choice.chat,
        num_fewshot=max(shots),
        limit=settings.limit,
        seed=settings.seed,
        repeats=settings.repeats,
        temperature=settings.temperature,
        max_tokens=settings.max_tokens,
        harness=harness()[0],
        harness_version=harness()[1],
        data=source_of_rows(name, tasks, data),
        documents_sha256=_documents(runs[0]),
        prompts=answers.requests,
        prompts_sha256=answers.prompts_sha256,
        scores=scores,
        samples=file_entry(samples),
        target=target_name,
        engine=server.engine,
        engine_version=server.version,
        command=server.command,
        environment=server.environment,
        weights="the checkpoint as it is" if subject.why_decoded is None else "decoded to BF16",
        why_decoded=subject.why_decoded,
        arithmetic=computed,
        sandbox=ran_in,
        sentences=sentences,
        kept_answers=answers.kept,
        seconds=time.monotonic() - started,
    )
    write_json(out, record)
    answers.drop()
    return record


def _ask(
    subject: str,
    name: str,
    tasks: list[Any],
    choice: Choice,
    settings: Served,
    server: Server,
    model: Path,
    target: Target,
    context: int,
    answers: AnswerLog,
) -> tuple[list[Row], list[dict]]:
    """(the rows with their results, lm-eval's own results of each repeat)."""
    from lm_eval.evaluator import evaluate

    rows: dict[str, Row] = {}
    runs = []
    for task in tasks:
        _set(task, choice, settings)
    for repeat in range(settings.repeats):
        random.seed(settings.seed)
        answers.repeat = repeat
        lm = client(server, model, target, choice.chat, settings.seed + repeat, context, answers)
        try:
            # Its wrapper `simple_evaluate` would describe the machine, which takes longer than some benchmarks.
            results = evaluate(
                lm=lm,
                task_dict={"tasks": {str(task.config.task): task for task in tasks}},
                limit=settings.limit,
                bootstrap_iters=0 if settings.repeats > 1 else BOOTSTRAP_RESAMPLES,
                apply_chat_template=choice.chat,
                fewshot_as_multiturn=True,
                confirm_run_unsafe_code=False,
            )
        except RequantError:
            raise
        except Exception as error:  # lm-eval passes on whatever its HTTP clients raise
            became = trouble(server) or "its log says more"
            raise RequantError(
                f"{subject}: {name}: {type(error).__name__}: {plain(error)}; expected answers from {server.engine}: "
                f"{became}; the answers so far are kept, and the same command goes on with them"
            ) from error
        _collect(results, rows)
        runs.append(results)
    return list(rows.values()), runs


def _set(task: Any, choice: Choice, settings: Served) -> None:
    """Puts what the config says over the task's own settings; no examples are added to a task that has none."""
    generation: dict[str, Any] = {}
    if settings.temperature:
        generation |= {"temperature": settings.temperature, "do_sample": True}
    if settings.max_tokens is not None:
        generation["max_gen_toks"] = settings.max_tokens
    if task.OUTPUT_TYPE == "generate_until" and generation:
        task.set_config("generation_kwargs", generation, update=True)
    own = task.get_config("num_fewshot")
    if own != 0:
        task.set_config("num_fewshot", own or 0 if choice.num_fewshot is None else choice.num_fewshot)
    task.set_fewshot_seed(settings.seed)


def _collect(results: dict, rows: dict[str, Row]) -> None:
    """Adds the results of one repeat to the rows, which are made in the order of the first."""
    for task, logged in sorted(results["samples"].items()):
        seen = set()
        for sample in logged:
            key = f"{task}/{sample['doc_id']}"
            row = rows.setdefault(key, Row(key, sample["prompt_hash"][:16]))
            for metric in sample["metrics"]:
                row.results[metric, sample["filter"]].append(sample[metric])
            if key not in seen and isinstance(sample["resps"][0][0], str):
                row.answers.append(sample["resps"][0][0])
            seen.add(key)


def _scores(name: str, rows: list[Row], runs: list[dict], tasks: list[Any]) -> list[Score]:
    """A score for each metric and filter, over all rows of all tasks; one that is no mean over rows by task."""
    scores = []
    for metric, kind in dict.fromkeys(key for row in rows for key in row.results):
        held = [row for row in rows if (metric, kind) in row.results]
        leaves = list(dict.fromkeys(row.key.rpartition("/")[0] for row in held))
        label = _label(metric, kind)
        higher = all(run["higher_is_better"].get(leaf, {}).get(metric) is not False for run in runs for leaf in leaves)
        if _is_mean(metric, kind, held, leaves, runs):
            pairs = [paired.of_row(row.results[metric, kind]) for row in held]
            value, stderr = paired.score(pairs), paired.standard_error(pairs)
            scores.append(_score(name, label, higher, value, stderr, len(held)))
            continue
        for leaf in leaves:
            value = statistics.fmean(_lm_evals(run, leaf, metric, kind) for run in runs)
            given = runs[0]["results"][leaf].get(f"{metric}_stderr,{kind}")
            stderr = float(given) if isinstance(given, int | float) else None
            count = sum(row.key.startswith(f"{leaf}/") for row in held)
            scores.append(_score(leaf, label, higher, value, stderr, count))
    return scores


def _label(metric: str, kind: str) -> str:
    """A score's name: the metric, and the filter that an answer went through, if any."""
    return metric if kind == "none" else f"{metric} ({kind})"


def _score(task: str, metric: str, higher: bool, value: float, stderr: float | None, samples: int) -> Score:
    if not math.isfinite(value):
        raise RequantError(f"{task}: {metric}: {value}; expected a finite number")
    return Score(task=task, metric=metric, higher_is_better=higher, value=value, stderr=stderr, samples=samples)


def _is_mean(metric: str, kind: str, rows: list[Row], leaves: list[str], runs: list[dict]) -> bool:
    """Whether lm-eval's score of each task, in each repeat, is the mean of the results of its rows."""
    for number, run in enumerate(runs):
        for leaf in leaves:
            results = [row.results[metric, kind][number] for row in rows if row.key.rpartition("/")[0] == leaf]
            try:
                own = paired.score([paired.of_row([result]) for result in results])
            except (TypeError, ValueError, ZeroDivisionError):
                return False
            if abs(own - _lm_evals(run, leaf, metric, kind)) > SAME:
                return False
    return True


def _lm_evals(run: dict, task: str, metric: str, kind: str) -> float:
    return float(run["results"][task][f"{metric},{kind}"])


def _line(row: Row) -> str:
    """A row of the samples file. Results are lists with one entry for each repeat."""
    results = {
        metric if kind == "none" else f"{metric} ({kind})": found for (metric, kind), found in row.results.items()
    }
    line = {"row": row.key, "prompt": row.prompt, "results": results}
    if row.answers:
        line["answers"] = row.answers
    return json.dumps(line, sort_keys=True, default=_plain) + "\n"


def _plain(value: Any) -> Any:
    """A number of numpy's as Python's own."""
    return value.item()


def _documents(run: dict) -> str:
    hashes = [sample["doc_hash"] for _, logged in sorted(run["samples"].items()) for sample in logged]
    return hashlib.sha256("".join(hashes).encode()).hexdigest()


def _context(model: Path) -> int:
    return int(json.loads((model / "config.json").read_text(encoding="utf-8")).get("max_position_embeddings", 2048))


def _check_chat(name: str, subject: Subject, model: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model, local_files_only=True, trust_remote_code=False)
    if tokenizer.chat_template is None:
        raise RequantError(
            f"{subject.directory}: no chat template, which served.{name} asks through; expected one, or `chat: false`"
        )


@contextlib.contextmanager
def _sentences(name: str, seed: int) -> Iterator[str | None]:
    """What IFEval's judgement needs besides; of other benchmarks nothing."""
    if name != "ifeval":
        yield None
        return
    from requant.sentences import sentence_model

    with sentence_model(seed) as words:
        yield words


def _sandbox(name: str, settings: Sandbox) -> tuple[Callable[[dict[str, Any], str], bool] | None, dict | None]:
    """(what runs a program of HumanEval with its tests, where that is); of other benchmarks nothing is run."""
    if name != "humaneval":
        return None, None
    from requant.sandbox import humaneval_program, limits_of, run_untrusted, which_sandbox

    backend, limits = which_sandbox(settings), limits_of(settings)

    def passes(row: dict[str, Any], completion: str) -> bool:
        program = humaneval_program(row["prompt"], completion, row["test"], row["entry_point"])
        return run_untrusted(program, limits, backend).passed

    return passes, backend.record() | dataclasses.asdict(limits)

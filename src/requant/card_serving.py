"""What a card says of serving: the command, verdicts of the smoke test, throughput, scores of what was served."""

import shlex
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from requant import wording
from requant.arithmetic import in_words
from requant.engine_command import docker_command, shell
from requant.records import Check, DeployRecord, ServedBenchmarkRecord, Spread, ThroughputRecord

NOTHING = "—"


class Facts(Protocol):
    """What is read here of `card.ReleaseFacts`."""

    name: str
    served: list[ServedBenchmarkRecord]


def serving_command(deploy: DeployRecord) -> str:
    """The command that the smoke test ran, as a shell reads it: {model} and {port} are left as they are."""
    if deploy.container is not None:
        return _unquoted(shell, docker_command(deploy.container["request"]))
    words = [f"{key}={shlex.quote(value)}" for key, value in sorted(deploy.environment.items())]
    return " ".join([*words, _unquoted(shlex.join, deploy.command)])


def _unquoted(join: Callable[[list[str]], str], words: list[str]) -> str:
    """`words` joined for a shell, which would have words with braces in quotes."""
    stand_ins = {f"{{{name}}}": f"@@{name}@@" for name in ("model", "port")}
    for name, stand_in in stand_ins.items():
        words = [word.replace(name, stand_in) for word in words]
    text = join(words)
    for name, stand_in in stand_ins.items():
        text = text.replace(stand_in, name)
    return text


def check_table(checks: Sequence[Check]) -> list[list[str]]:
    """The checks of a smoke test, a row each: name, verdict, samples, found (or why it tells nothing), expected."""
    return [
        [
            check.name.replace("_", " "),
            check.verdict,
            NOTHING if check.samples is None else wording.number(check.samples),
            check.found or check.reason or "",
            check.expected or "",
        ]
        for check in checks
    ]


def throughput_table(speed: ThroughputRecord) -> list[list[str]]:
    """A row for each number of requests at a time: medians, with the lowest and the highest."""
    return [
        [
            str(level.concurrency),
            str(level.requests),
            _spread(level.prompt_tokens),
            _spread(level.first_token_seconds),
            NOTHING if level.decode_tokens_per_second is None else _spread(level.decode_tokens_per_second),
            _spread(level.total_tokens_per_second),
        ]
        for level in speed.levels
    ]


def _spread(found: Spread) -> str:
    median, lowest, highest = map(wording.figure, (found.median, found.lowest, found.highest))
    return median if lowest == highest else f"{median} ({lowest} to {highest})"


def machine_text(machine: dict[str, Any]) -> str:
    """The kind of machine that a figure was measured on."""
    gpus = machine.get("gpus") or []
    return ", ".join(gpus) if gpus else f"{machine['cpu']}, {machine['system']} {machine['architecture']}"


def served_table(releases: Sequence[Facts]) -> list[list[str]]:
    """The benchmarks of the served releases, a row each: what was asked, the score, where it was expected, the
    source's, what is left of it, and whether the two differ on the same rows."""
    rows = []
    for facts in releases:
        for record in facts.served:
            rows.append(
                [
                    f"{record.measured.name}{_shots(record)}",
                    f"`{facts.name}`",
                    record.metric,
                    wording.number(_score(record).samples),
                    wording.with_error(record.score, record.stderr),
                    _expected(record),
                    _source(record),
                    _recovery(record),
                    _paired(record),
                ]
            )
    return rows


def _score(record: ServedBenchmarkRecord):
    return next(score for score in record.measured.scores if score.metric == record.metric)


def _shots(record: ServedBenchmarkRecord) -> str:
    return f", {record.measured.num_fewshot}-shot" if record.measured.num_fewshot else ""


def _expected(record: ServedBenchmarkRecord) -> str:
    if record.expected is None:
        return NOTHING
    low, high = record.expected
    return f"{low:g} to {high:g}: {'inside' if record.verdict == 'inside' else f'**{record.verdict}**'}"


def _source(record: ServedBenchmarkRecord) -> str:
    if record.source_score is None:
        return NOTHING
    score = wording.with_error(record.source_score, record.source_stderr)
    return f"{score}, published: {record.citation}" if record.source_kind == "cited" else score


def _recovery(record: ServedBenchmarkRecord) -> str:
    if record.recovery is None:
        return NOTHING
    interval = record.recovery_interval
    within = "" if interval is None else f" ({wording.percent(interval[0])} to {wording.percent(interval[1])})"
    return f"{wording.percent(record.recovery)}{within}"


def _paired(record: ServedBenchmarkRecord) -> str:
    if (test := record.paired.get(record.metric)) is None:
        return record.unpaired_because or NOTHING
    return f"p = {wording.figure(test.p_value)} ({test.test}; better on {test.better}, worse on {test.worse})"


def served_trials(releases: Sequence[Facts]) -> list[str]:
    """The benchmarks of served releases that were measured on the first rows of their tasks alone, with the number."""
    found = {
        f"{record.measured.name} ({record.measured.limit})": None
        for facts in releases
        for record in facts.served
        if record.measured.limit is not None
    }
    return list(found)


def measured_how(releases: Sequence[Facts]) -> list[str]:
    """How each benchmark of served releases was measured, in a sentence each; alike ones once."""
    sentences: dict[str, None] = {}
    for facts in releases:
        for record in facts.served:
            run = record.measured
            tasks = run.tasks if len(run.tasks) < 4 else {f"{len(run.tasks)} tasks": next(iter(run.tasks.values()))}
            asked = ", ".join(f"{task} (version {version})" for task, version in tasks.items())
            parts = [
                f"by {run.method}",
                "through the chat template" if run.chat_template else "as plain text",
                f"temperature {run.temperature:g}",
                f"seed {run.seed}",
                wording.plural(run.repeats, "run"),
                f"{wording.plural(run.prompts, 'request')} with prompts of sha256 `{run.prompts_sha256[:16]}…`",
                f"rows: {run.data}",
                f"{run.harness} {run.harness_version}",
            ]
            parts += [f"engine: {in_words(run.arithmetic)}"] if run.arithmetic is not None else []
            parts += [f"the model's code ran in {run.sandbox['kind']}"] if run.sandbox else []
            sentences[f"{run.name}: {asked}; {', '.join(parts)}"] = None
    return list(sentences)


FILTERS = (
    *(serving_command, in_words, check_table, throughput_table, machine_text),
    *(served_table, served_trials, measured_how),
)

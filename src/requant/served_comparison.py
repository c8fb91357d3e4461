"""What a release's served scores are held against: an expected range, and the source model's score.

The source's is measured through the same target, row by row on the same prompts; or it is a published figure, and is
marked as one.
"""

import json
import math
from pathlib import Path

from requant import paired
from requant.config import Cited, Served
from requant.errors import RequantError
from requant.hashing import file_entry
from requant.records import PairedTest, Score, ServedBenchmarkRecord, ServedMeasurement, read_json, write_json
from requant.served_tasks import CONVENTIONS


def compare(
    release: str,
    settings: Served,
    measured: Path,
    samples: Path,
    out: Path,
    source_model: str,
    source: Path | None = None,
    source_samples: Path | None = None,
) -> ServedBenchmarkRecord:
    """Holds the scores in `measured` against the expected range and the source model's, measured or cited.

    samples, source_samples: the rows of each. Raises RequantError if there is no score of the metric that is asked for,
    or if a file of rows is not the one that was measured.
    """
    record = read_json(measured, ServedMeasurement)
    wanted = settings.metric or _conventional(record)
    score = _of_metric(record, wanted, release)
    cited = settings.source if isinstance(settings.source, Cited) else None
    theirs = read_json(source, ServedMeasurement) if source is not None else None
    source_value = cited.value if cited else _of_metric(theirs, wanted, source_model).value if theirs else None
    source_stderr = _of_metric(theirs, wanted, source_model).stderr if theirs else None
    unpaired = _unpaired(record, theirs, cited)
    tests: dict[str, PairedTest] = {}
    interval, method = None, None
    recovery = None if source_value is None else _ratio(score, source_value)
    if theirs is not None and unpaired is None:
        ours, others = _rows(samples, record), _rows(source_samples, theirs)
        for each in record.scores:
            both = _both(each.metric, ours, others)
            if both is not None:
                tests[each.metric] = paired.compare(*both, each.higher_is_better)
        both = _both(wanted, ours, others)
        if recovery is not None and both is not None:
            interval, method = paired.recovery_interval(*both, score.higher_is_better), paired.BOOTSTRAP
    if recovery is not None and interval is None:
        interval = paired.independent_interval(recovery, score.value, score.stderr, source_value, source_stderr)
        method = None if interval is None else paired.CITED if cited else paired.DELTA
    low, high = settings.expected or (-math.inf, math.inf)
    verdict = "below" if score.value < low else "above" if score.value > high else "inside"
    result = ServedBenchmarkRecord(
        release=release,
        measured=record,
        metric=wanted,
        score=score.value,
        stderr=score.stderr,
        higher_is_better=score.higher_is_better,
        expected=settings.expected,
        verdict=verdict if settings.expected else None,
        source_kind="cited" if cited else "measured" if theirs else None,
        source_model=source_model,
        source_score=source_value,
        source_stderr=source_stderr,
        citation=cited.citation if cited else None,
        source_scores=theirs.scores if theirs else None,
        recovery=recovery,
        recovery_interval=interval,
        interval_method=method,
        paired=tests,
        unpaired_because=unpaired,
    )
    write_json(out, result)
    return result


def told(record: ServedBenchmarkRecord) -> list[str]:
    """The result in one line, and a warning if the score is not where it was expected."""
    error = "" if record.stderr is None else f" +- {record.stderr:.4f}"
    line = f"{record.release}: {record.measured.name}: {record.metric} {record.score:.4f}{error}"
    if record.recovery is not None:
        line += f", recovery {record.recovery:.3f}"
    if test := record.paired.get(record.metric):
        line += f" (paired p = {test.p_value:.3g})"
    if record.verdict in (None, "inside"):
        return [line]
    low, high = record.expected
    return [
        line,
        f"warning: {record.release}: {record.measured.name}: {record.metric} {record.score:.4f} is {record.verdict} "
        f"the expected range, {low:g} to {high:g}",
    ]


def _conventional(record: ServedMeasurement) -> str:
    """The score that is the benchmark's: by its convention, else the first."""
    convention = CONVENTIONS.get(record.name)
    if convention is None:
        return record.scores[0].metric
    by_likelihood = record.method == "log-likelihood" and convention.by_likelihood
    return (by_likelihood or convention.by_generation).metric


def _of_metric(record: ServedMeasurement, metric: str, subject: str) -> Score:
    found = next((score for score in record.scores if score.metric == metric), None)
    if found is None:
        there = ", ".join(score.metric for score in record.scores)
        raise RequantError(f"{subject}: {record.name}: no score {metric!r} was measured; expected one of {there}")
    return found


def _ratio(score: Score, source: float) -> float | None:
    part, whole = (score.value, source) if score.higher_is_better else (source, score.value)
    return part / whole if source and whole else None


def _unpaired(record: ServedMeasurement, source: ServedMeasurement | None, cited: Cited | None) -> str | None:
    """Why the rows of both can't be held against each other; None if they can."""
    if cited:
        return "the source's score is a published one"
    if source is None:
        return "the source was not measured"
    if (record.prompts_sha256, record.documents_sha256) != (source.prompts_sha256, source.documents_sha256):
        return "the source was asked other prompts"
    return None


def _rows(path: Path, record: ServedMeasurement) -> dict[str, dict[str, list]]:
    """{row: its results by metric} of a samples file. RequantError if it is not the one of the record."""
    if not path.exists() or (found := file_entry(path)) != record.samples:
        sha = "nothing" if not path.exists() else f"sha256 {found.sha256[:16]}..."
        raise RequantError(f"{path}: {sha} found; expected {record.samples.sha256[:16]}...: delete it to measure again")
    lines = (json.loads(line) for line in path.read_text(encoding="utf-8").splitlines())
    return {line["row"]: line["results"] for line in lines}


def _both(metric: str, ours: dict, theirs: dict) -> tuple[list, list] | None:
    """The (hits, weight) of each row of both; None for a metric that is no mean over rows, or of other rows."""
    held = [key for key, results in ours.items() if metric in results]
    if not held or any(metric not in theirs.get(key, {}) for key in held):
        return None
    try:
        return [paired.of_row(ours[key][metric]) for key in held], [paired.of_row(theirs[key][metric]) for key in held]
    except (TypeError, ValueError):
        return None

""".eval_results/*.yaml: the scores of a release as the hub's model pages and leaderboards read them.

The format is huggingface_hub's. An entry names a data set of the hub and a task of it, so that only scores on such
data can be told: the config says which lm-eval task is which (`benchmarks.{name}.hub`).
"""

from collections.abc import Mapping

import yaml
from huggingface_hub import EvalResultEntry, eval_result_entries_to_yaml

from requant.config import HubTask
from requant.errors import RequantError
from requant.records import BenchmarkRecord


def eval_results(record: BenchmarkRecord, tasks: Mapping[str, HubTask]) -> str:
    """The YAML of the scores in `record` for the `tasks` that are benchmarks of the hub, by name of the lm-eval task.

    No date is given: the hub takes that of the commit. RequantError if a task has no such score.
    """
    scores = {(score.task, score.metric): score.value for score in record.scores}
    entries = []
    for task, hub in tasks.items():
        if (task, hub.metric) not in scores:
            there = ", ".join(sorted(f"{name}/{metric}" for name, metric in scores)) or "none"
            raise RequantError(
                f"benchmarks.{record.benchmark}.hub.{task}: no score {task}/{hub.metric} was measured; there: {there}"
            )
        notes = f"lm-eval {record.harness_version}; {record.arithmetic}"
        entries.append(
            EvalResultEntry(
                dataset_id=hub.dataset,
                task_id=hub.task,
                value=scores[task, hub.metric],
                dataset_revision=hub.revision,
                notes=notes,
            )
        )
    return yaml.safe_dump(eval_result_entries_to_yaml(entries), sort_keys=True, allow_unicode=True)

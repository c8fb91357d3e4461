"""What engines did with releases of each family and scheme when they were run: engine_runs.csv, a line a cell.

`python benchmarks/engines.py --table` writes it from its rows. What was not run is in `arithmetic.FACTS`.
"""

import csv
from dataclasses import dataclass, fields
from functools import cache
from pathlib import Path
from typing import Literal

from packaging.version import Version

TABLE = Path(__file__).with_name("engine_runs.csv")
CPU = "cpu"


@dataclass(frozen=True)
class Run:
    """A release of `case` in `scheme`, served by `engine` of `version` on a `gpu` (sm90, or cpu).

    case: the family, by `model_type`; widths that are not a family's usual ones behind a comma. packed: "all" if all
    Linears were, "as planned" if what the engine needs in BF16 stayed so. outcome: refused, if the engine ended before
    it served; wrong, if the smoke test failed. off: how far log-probabilities were off, in times of what rounding
    explains. told: the engine's own error, or the checks that failed.
    """

    engine: str
    version: str
    gpu: str
    case: str
    scheme: str
    packed: Literal["all", "as planned"]
    outcome: Literal["served", "refused", "wrong"]
    off: str
    kernels: str
    told: str

    @property
    def where(self) -> str:
        """The engine and what it ran on, for people."""
        return f"{self.engine} {self.version} on {self.gpu}"

    @property
    def problem(self) -> str | None:
        """Why a release like this one is not served, in the engine's words; None if it is."""
        if self.outcome == "served":
            return None
        what = f"refuses {self.scheme}" if self.outcome == "refused" else f"answers {self.scheme} wrongly"
        return f"{self.engine} {self.version} {what} of {self.case} on {self.gpu} (run there: {self.told})"


COLUMNS = [field.name for field in fields(Run)]


@cache
def runs() -> tuple[Run, ...]:
    """All lines of the table, in its order."""
    with TABLE.open(encoding="utf-8", newline="") as file:
        return tuple(Run(**line) for line in csv.DictReader(file))


def last_run(engine: str, model_type: str, scheme: str, gpu: str) -> Run | None:
    """That of the newest version of the engine with a release as planned; None if there was none."""
    found = [
        run
        for run in runs()
        if (run.engine, run.case, run.scheme, run.gpu, run.packed) == (engine, model_type, scheme, gpu, "as planned")
    ]
    return max(found, key=lambda run: Version(run.version), default=None)

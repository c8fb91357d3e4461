"""The table of a block's routed experts: how often each was chosen on the calibration tokens, and what it added.

expert, group: numbers from 0; the group is the router's. tokens: how many were routed to the expert. frequency: its
part of all routed choices. weighted_frequency: its part of all gates. saliency: the mean over its tokens of gate x L2
norm of its output (REAP, arXiv 2510.13999), 0 for an expert never reached. mass: the sum of the same. A dense block has
no rows.
"""

from collections.abc import Sequence
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING

from requant.errors import RequantError
from requant.records import write_text

if TYPE_CHECKING:
    import pandas as pd

COLUMNS = ("expert", "group", "tokens", "frequency", "weighted_frequency", "saliency", "mass")
DIGEST_LINE = "# xxh3_64 "


def table_of(tokens: Sequence[int], gates: Sequence[float], mass: Sequence[float], groups: int) -> "pd.DataFrame":
    """The table, from sums by expert: of tokens, of gates, and of gate x norm of the expert's output."""
    import pandas as pd

    table = pd.DataFrame({"expert": range(len(tokens)), "tokens": tokens, "gates": gates, "mass": mass})
    table["group"] = table["expert"] * groups // max(len(table), 1)
    table["frequency"] = table["tokens"] / max(table["tokens"].sum(), 1)
    table["weighted_frequency"] = table["gates"] / (table["gates"].sum() or 1.0)
    table["saliency"] = table["mass"] / table["tokens"].clip(lower=1)
    return table[list(COLUMNS)]


def write_table(path: str | Path, table: "pd.DataFrame") -> None:
    """Writes the table as CSV, whole; floats with all their digits. Its last line, a comment, has its digest."""
    text = table.to_csv(index=False, lineterminator="\n")
    write_text(path, f"{text}{DIGEST_LINE}{_digest(text)}\n")


def read_table(path: str | Path) -> "pd.DataFrame":
    """Reads what `write_table` wrote. RequantError if it is absent, has other columns, or has changed since."""
    import pandas as pd

    try:
        text, found, kept = Path(path).read_text(encoding="utf-8").partition(DIGEST_LINE)
        table = pd.read_csv(StringIO(text))
    except FileNotFoundError:
        raise RequantError(f"{path}: not there; expected a table of saliencies written by its stage") from None
    except ValueError as error:
        raise RequantError(f"{path}: no CSV ({error}); expected a table of saliencies; delete it to rebuild") from None
    if tuple(table.columns) != COLUMNS:
        raise RequantError(
            f"{path}: columns {', '.join(table.columns)}; expected {', '.join(COLUMNS)}; delete it to rebuild"
        )
    if not found or _digest(text) != kept.strip():
        raise RequantError(f"{path}: not as it was written, by its last line; delete it to rebuild")
    return table


def _digest(text: str) -> str:
    import xxhash

    return xxhash.xxh3_64_hexdigest(text.encode())

"""Files from the future: Snakemake compares times, and takes no result that is older than what it was made of.

A clock that was ahead and has been set back leaves such files; so may a copy from a machine with another clock. A job
would compute for hours and its result would be thrown away, so a build does not begin with them.
"""

import os
import shlex
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

from requant.errors import RequantError
from requant.wording import duration

COMPUTES = False  # it lets a build begin or not

SKEW = 60  # seconds that the clocks of nodes with one file system may differ by


def check_times(roots: Iterable[str | Path]) -> None:
    """Looks at each of `roots` that is there, and at all files below it.

    Raises RequantError naming the file that is furthest ahead of this machine's clock, and how to go on.
    """
    roots = [root for root in dict.fromkeys(map(Path, roots)) if root.exists()]
    limit = time.time() + SKEW
    ahead = {path: changed for path in _files(roots) if (changed := _time(path)) > limit}
    if not ahead:
        return
    changed, path = max((changed, path) for path, changed in ahead.items())
    at, by = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(changed)), duration(changed - time.time())
    more = len(ahead) - 1
    others = f", and {more} more {'file is' if more == 1 else 'files are'} ahead too" if more else ""
    folders = sorted({shlex.quote(str(root)) for root in roots if any(root in (it, *it.parents) for it in ahead)})
    raise RequantError(
        f"{path}: its time, {at}, is {by} ahead of this machine's clock{others}; Snakemake takes no result that is "
        "older than an input. Correct the clock; where it is right, give them its time: "
        f"find -L {' '.join(folders)} -newermt now -exec touch {{}} +"
    )


def _files(roots: list[Path]) -> Iterator[Path]:
    for root in roots:
        if root.is_file():
            yield root
        for folder, _, names in os.walk(root):
            yield from (Path(folder, name) for name in names)


def _time(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:  # gone since, or a link to nothing
        return 0.0

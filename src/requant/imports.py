"""Which modules of this library a script imports: what makes its results stale when it changes.

Snakemake notices a changed script but not a changed module behind it. The rules declare what this module finds by
parsing, so that no list is kept by hand. Imports inside functions count too.
"""

import ast
from functools import cache
from pathlib import Path

PACKAGE = "requant"

# Modules that name, carry and report but compute nothing: values reach a job as params, records are checked when they
# are read, files from the hub by `locks`. A new field of a record must not cost hours of tuning.
NOT_COMPUTING = ("__init__", "config", "download", "errors", "hub", "imports", "jobs", "records", "whole")


def modules_of(script: str | Path, source_root: str | Path) -> list[str]:
    """Files of the package under `source_root` that `script` imports, directly or through one another, sorted.

    Those that compute nothing are left out.
    """
    root = Path(source_root)
    found: set[Path] = set()
    waiting = list(_imports(Path(script), root))
    while waiting:
        module = waiting.pop()
        if module not in found:
            found.add(module)
            waiting += _imports(module, root)
    return sorted(str(module) for module in found if module.stem not in NOT_COMPUTING)


@cache
def _imports(path: Path, root: Path) -> frozenset[Path]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"), filename=str(path))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    files = (_file(name, root) for name in names if name.partition(".")[0] == PACKAGE)
    return frozenset(file for file in files if file is not None)


def _file(name: str, root: Path) -> Path | None:
    path = root.joinpath(*name.split("."))
    for candidate in (path.with_suffix(".py"), path / "__init__.py"):
        if candidate.exists():
            return candidate
    return None

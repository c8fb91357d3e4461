"""What a script computes with: the modules of this library that it imports, the files they read, other libraries.

Snakemake notices a changed script, but neither a changed module behind it nor a changed library. The rules declare
what is found here by parsing, so that no list is kept by hand. Imports inside functions count too; those for type
checkers do not.

A module that names, carries and reports, but gives no number its value, says so itself: `COMPUTES = False`, with the
reason. It is left out, with what it imports. Any other module computes.
"""

import ast
import hashlib
import os
import platform
import re
from functools import cache
from pathlib import Path
from typing import NamedTuple

from requant.distributions import versions_behind

PACKAGE = "requant"
COMPUTES = False  # what is found here decides whether a job runs, not what it writes


def modules_of(script: str | Path, source_root: str | Path) -> list[str]:
    """Files of the package under `source_root` that `script` computes with, sorted: the modules that it imports,
    directly or through one another, and the files and folders beside them that their strings name (templates)."""
    modules = _behind(Path(script), Path(source_root))
    return sorted(map(str, modules.union(*(_named_files(path, Path(source_root)) for path in modules))))


def code_of(script: str | Path, source_root: str | Path) -> list[str]:
    """`script` and its `modules_of`, each as its name and a digest of what it says: "requant/fused.py 0a1b2c3d4e5f".

    Comments, docstrings and layout of Python code change no digest, nor does the place of the checkout.
    """
    script, root = Path(script), Path(source_root)
    named = {path.relative_to(root).as_posix(): path for path in map(Path, modules_of(script, root))}
    named = {f"{script.parent.name}/{script.name}": script} | named
    return [f"{name} {_digest(path, root)}" for name, path in named.items()]


def libraries_of(script: str | Path, source_root: str | Path) -> list[str]:
    """What else `script` runs on, as "name==version": Python, and each installed distribution that it imports, directly
    or through modules that compute, with what those require in turn.

    Where the environment variable REQUANT_ENVIRONMENT is set (the Nix store path of an environment), it is one more.
    """
    root = Path(source_root)
    behind = [Path(script), *_behind(Path(script), root)]
    imported = {name.partition(".")[0] for path in behind for name in _said(path, root).imports}
    found = {"python": platform.python_version()} | versions_behind(frozenset(imported - {PACKAGE}))
    if environment := os.environ.get("REQUANT_ENVIRONMENT"):
        found["environment"] = environment
    return [f"{name}=={version}" for name, version in found.items()]


class _Said(NamedTuple):
    """What the code of a file says, without docstrings and what is for type checkers."""

    code: str
    imports: frozenset[str]
    strings: frozenset[str]
    computes: bool


@cache
def _said(path: Path, root: Path) -> _Said:
    tree = _Stripped().visit(ast.parse(path.read_text(encoding="utf-8"), filename=str(path)))
    package = path.relative_to(root).parent.parts if path.is_relative_to(root) else ()
    imports: set[str] = set()
    strings: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            imports |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) + 1 - node.level] if node.level else ()
            module = ".".join([*above, *filter(None, [node.module])])
            imports |= {module, *(f"{module}.{alias.name}" for alias in node.names)}
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            strings.add(node.value)
    assigned = (ast.unparse(node) for node in tree.body if isinstance(node, ast.Assign))
    return _Said(ast.dump(tree), frozenset(imports), frozenset(strings), "COMPUTES = False" not in assigned)


class _Stripped(ast.NodeTransformer):
    """Takes docstrings out of a tree, and branches that only a type checker takes."""

    def generic_visit(self, node: ast.AST) -> ast.AST:
        """Visits the children of a node that has lost its docstring; no expression holds a statement."""
        if isinstance(node, ast.expr):
            return node
        has_docstring = isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
        if has_docstring and ast.get_docstring(node, clean=False) is not None:
            node.body = node.body[1:]
        return super().generic_visit(node)

    def visit_If(self, node: ast.If) -> ast.AST | list[ast.stmt]:
        """The `else` of an `if TYPE_CHECKING`."""
        # Writing every test of a library out would take half a second.
        named = isinstance(node.test, ast.Name | ast.Attribute)
        if named and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING"):
            return [self.visit(statement) for statement in node.orelse]
        return self.generic_visit(node)


@cache
def _behind(script: Path, root: Path) -> frozenset[Path]:
    """The modules that `script` computes with."""
    found: set[Path] = set()
    waiting = list(_modules(script, root))
    while waiting:
        module = waiting.pop()
        if module not in found and _said(module, root).computes:
            found.add(module)
            waiting += _modules(module, root)
    return frozenset(found)


@cache
def _modules(path: Path, root: Path) -> frozenset[Path]:
    """Modules of the package that a file imports, or names in a string as a command would (`python -m`)."""
    said = _said(path, root)
    named = {text for text in said.strings if re.fullmatch(rf"{PACKAGE}(\.\w+)+", text)}
    own = {name for name in said.imports | named if name.partition(".")[0] == PACKAGE}
    return frozenset(filter(None, (_file(name, root) for name in own)))


@cache
def _file(name: str, root: Path) -> Path | None:
    path = root.joinpath(*name.split("."))
    return next((found for found in (path.with_suffix(".py"), path / "__init__.py") if found.exists()), None)


@cache
def _named_files(module: Path, root: Path) -> frozenset[Path]:
    """Files in the folder of a module that are no Python and that a string of it names, alone or by their folder."""
    names = (
        text for text in _said(module, root).strings if re.fullmatch(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)*", text)
    )
    places = [place for name in names if (place := module.parent / name).exists()]
    files = (file for place in places for file in (place.rglob("*") if place.is_dir() else [place]))
    return frozenset(file for file in files if file.is_file() and file.suffix not in (".py", ".pyc"))


@cache
def _digest(path: Path, root: Path) -> str:
    content = _said(path, root).code.encode() if path.suffix == ".py" else path.read_bytes()
    return hashlib.sha256(content).hexdigest()[:12]

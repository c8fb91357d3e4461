"""Installed distributions behind imported names, with all that they require, from the metadata that pip leaves."""

import re
import sys
from functools import cache
from importlib.metadata import Distribution, distributions, packages_distributions

from packaging.requirements import Requirement

COMPUTES = False  # what is found here decides whether a job runs, not what it writes


@cache
def versions_behind(imported: frozenset[str]) -> dict[str, str]:
    """{distribution: version}, by name, of what top-level names are imported from, and of what that requires in turn.

    Extras and environment markers are respected. Of what is required, what is not installed is left out; of what is
    imported, it has the version "none". Modules of Python itself are in no distribution.
    """
    found: dict[str, str] = {}
    waiting: list[tuple[str, str]] = []
    for name in imported - sys.stdlib_module_names:
        providers = _providers(name)
        found |= {} if providers else {canonical(name): "none"}
        waiting += [(provider, "") for provider in providers]
    seen: set[tuple[str, str]] = set()
    while waiting:
        name, extra = waiting.pop()
        if (name, extra) in seen or name not in _installed():
            continue
        seen.add((name, extra))
        found[name] = _version(name)
        waiting += _required(name, extra)
    return dict(sorted(found.items()))


def canonical(name: str) -> str:
    """A distribution's name as the packaging standard compares names."""
    return re.sub(r"[-_.]+", "-", name).lower()


@cache
def _installed() -> dict[str, Distribution]:
    """The distributions by name; of two of one name the one that comes first on sys.path, as imports find it."""
    found: dict[str, Distribution] = {}
    for distribution in distributions():
        if name := distribution.metadata["Name"]:  # none in a folder that a broken removal left
            found.setdefault(canonical(name), distribution)
    return found


def _providers(name: str) -> list[str]:
    """The distributions that a top-level name is imported from."""
    own = _installed().get(canonical(name))
    if own is not None and any(own.locate_file(path).exists() for path in (name, f"{name}.py")):
        return [canonical(name)]
    return [canonical(found) for found in _all_packages().get(name, [])]


@cache
def _all_packages() -> dict[str, list[str]]:
    return dict(packages_distributions())


@cache
def _version(name: str) -> str:
    return _installed()[name].version  # each use of this property parses the distribution's metadata


@cache
def _requirements(name: str) -> list[Requirement]:
    return list(map(Requirement, _installed()[name].requires or []))


@cache
def _required(name: str, extra: str) -> list[tuple[str, str]]:
    """What a distribution requires here with one of its extras ("" for none), as names with each of their extras."""
    found = _requirements(name)
    wanted = [it for it in found if it.marker is None or it.marker.evaluate({"extra": extra})]
    return [(canonical(it.name), part) for it in wanted for part in ("", *sorted(it.extras))]

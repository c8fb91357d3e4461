"""The targets of config/targets/, a file each, and entries of a config that start from one of them.

They are put into the config's own `targets` before it is checked, so that whatever holds a config, a provenance.json
too, has its target spelled out and needs no file of this checkout.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from requant.config import NAME, Sandbox, Target, parse_target
from requant.errors import RequantError, brief, plain

COMPUTES = False  # it reads settings, which reach a job as params

FOLDER = "config/targets"


def read_targets(folder: Path) -> dict[str, dict[str, Any]]:
    """The targets of the files NAME.yaml in `folder`, by name; none if there is no such folder.

    Raises RequantError naming file and key of what is wrong in one.
    """
    found = {}
    for path in sorted(folder.glob("*.yaml")):
        data = _mapping(path)
        if not NAME.fullmatch(path.stem):
            raise RequantError(f"{path}: names have letters, digits, '.', '_' and '-' only, 100 at most")
        parse_target(data, str(path))
        found[path.stem] = data
    return found


def _mapping(path: Path) -> dict[str, Any]:
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise RequantError(f"{path}: not there; expected a YAML file") from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise RequantError(f"{path}: {plain(error)}; expected YAML") from None
    if not isinstance(data, dict):
        raise RequantError(f"{path}: {brief(data)}; expected keys of a target")
    return data


def with_targets(data: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """The config `data` with the targets of `folder` in its `targets`, and each `like` replaced by what it names.

    An entry of the config goes before a file of its name. What is no mapping stays, for `config.parse` to refuse.
    Raises RequantError naming the entry whose `like` names nothing, or leads back to itself.
    """
    own = data.get("targets")
    if own is not None and not isinstance(own, dict):
        return dict(data)
    files = read_targets(folder)
    known = files | (own or {})
    return dict(data) | {"targets": {name: _spelled_out(name, known, files) for name in known}}


def _spelled_out(name: str, known: Mapping[str, Any], files: Mapping[str, Any], seen: tuple[str, ...] = ()) -> Any:
    """The target `name` without a `like`. seen: the entries that led to it. An entry may start from its namesake."""
    entry = known[name]
    if not isinstance(entry, dict) or "like" not in entry:
        return entry
    base, rest = entry["like"], {key: value for key, value in entry.items() if key != "like"}
    if base == name and name in files:
        return merged(files[name], rest)
    if not isinstance(base, str) or base not in known:
        names = ", ".join(sorted(map(str, known)))
        raise RequantError(f"config: targets.{plain(name, 80)}.like: {brief(base)}; expected one of {names}")
    if base in (*seen, name):
        raise RequantError(f"config: targets.{name}.like: {base!r} leads back to {name!r}; expected another target")
    found = _spelled_out(base, known, files, (*seen, name))
    return merged(found, rest) if isinstance(found, dict) else found


def merged(base: Mapping[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
    """`base` with the values of `own`; of a key that is a mapping in both, the two merged."""
    both = {key: merged(base[key], own[key]) for key in base.keys() & own.keys() if _are_mappings(base[key], own[key])}
    return {**base, **own, **both}


def _are_mappings(*values: Any) -> bool:
    return all(isinstance(value, Mapping) for value in values)


def target_named(name: str, configfile: Path | None, folder: Path) -> Target:
    """The target called `name`: an entry of `configfile`, if one is given, else a file of `folder`.

    Raises RequantError with the names there are if there is no such target, or with what is wrong in it.
    """
    return own_targets(configfile, folder, name)[name]


def own_targets(configfile: Path | None, folder: Path, wanted: str | None = None) -> dict[str, Target]:
    """The targets of `configfile`, if one is given, and of the files of `folder`, by name; those that are `wanted`
    alone, if one is named.

    Raises RequantError with the names there are if there is no such target, or with what is wrong in one.
    """
    data = {} if configfile is None else _mapping(configfile)
    known = with_targets(data, folder)["targets"]
    if not isinstance(known, dict) or (wanted is not None and wanted not in known):
        names = ", ".join(sorted(map(str, known))) if isinstance(known, dict) else "none"
        raise RequantError(f"--target {plain(wanted, 80)}: no such target; expected one of {names}")
    chosen = known if wanted is None else {wanted: known[wanted]}
    where = f"{configfile or folder}: targets"
    return {
        str(name): parse_target({} if entry is None else entry, f"{where}.{name}") for name, entry in chosen.items()
    }


def own_sandbox(configfile: Path | None) -> Sandbox:
    """The `sandbox` of a config, its defaults without one. RequantError naming what is wrong in it."""
    data = {} if configfile is None else _mapping(configfile).get("sandbox") or {}
    try:
        return Sandbox.model_validate(data)
    except ValidationError as error:
        first = error.errors()[0]
        raise RequantError(f"{configfile}: sandbox.{'.'.join(map(str, first['loc']))}: {plain(first['msg'])}") from None

"""docs/config.md, written from the schema: `python -m requant.config_reference > docs/config.md`."""

from inspect import getdoc
from typing import Any, get_args, get_origin

from pydantic import BaseModel
from pydantic_core import PydanticUndefined

from requant.config import VERIFY_DEFAULTS as LIMITS
from requant.config import Benchmark, Calibration, Config, Model, Publish, Release, Sandbox, Target

INTRODUCTION = """\
# Every key of the config

Written from the schema by `python -m requant.config_reference`. `config.yaml` is read first; a file given by
`--configfile` is merged into it. An unknown key or a value out of range is an error before any job runs.
"""

SECTIONS = (
    ("models.{name}", Model),
    ("calibrations.{name}", Calibration),
    ("releases.{name}", Release),
    ("benchmarks.{name}", Benchmark),
    ("targets.{name}", Target),
    ("sandbox", Sandbox),
    ("publish", Publish),
)


def reference() -> str:
    """The whole page, Markdown."""
    parts = [INTRODUCTION]
    for title, section in SECTIONS:
        parts.append(f"## {title}\n\n{getdoc(section)}\n")
        parts.append("| key | default | meaning |\n|---|---|---|\n" + "\n".join(rows(section, "")) + "\n")
    parts.append(f"## build\n\n{Config.model_fields['build'].description}\n")
    limits = "\n".join(f"| {scheme} | {cosine} | {mae} |" for scheme, (cosine, mae) in LIMITS.items())
    parts.append(
        "## Default limits of `verify`\n\n| scheme | cosine, at least | relative MAE, at most |\n|---|---|---|\n"
        + limits
        + "\n"
    )
    return "\n".join(parts)


def rows(section: type[BaseModel], prefix: str) -> list[str]:
    """A table row for each key of `section`, keys of inner sections with dots."""
    found = []
    for field_name, field in section.model_fields.items():
        name = field.alias or field_name
        inner = _inner(field.annotation)
        default = field.get_default(call_default_factory=True)
        if inner is not None and isinstance(default, BaseModel):
            found += rows(inner, f"{prefix}{name}.")
            continue
        found.append(f"| `{prefix}{name}` | {_default(default)} | {_meaning(field)} |")
        if inner is not None:
            found += rows(inner, f"{prefix}{name}{_holds_many(field.annotation)}.")
    return found


def _inner(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((inner for argument in get_args(annotation) if (inner := _inner(argument))), None)


def _lists(annotation: Any) -> bool:
    """Whether the key holds a list of sections, and not one."""
    return get_origin(annotation) is list or any(_lists(argument) for argument in get_args(annotation))


def _holds_many(annotation: Any) -> str:
    """What stands behind a key for each of its sections: [] in a list, .{name} in a mapping, nothing for just one."""
    if get_origin(annotation) is dict:
        return ".{name}"
    return "[]" if _lists(annotation) else ""


def _default(value: Any) -> str:
    if value is PydanticUndefined:
        return "required"
    if isinstance(value, list) and value and isinstance(value[0], BaseModel):
        return ", ".join(f"`{item.path}`" for item in value)
    return "—" if value is None else f"`{value}`"


def _meaning(field: Any) -> str:
    values = [argument for argument in get_args(field.annotation) if isinstance(argument, str)]
    words = [field.description or "", f"one of {', '.join(f'`{value}`' for value in values)}" if values else ""]
    return "; ".join(filter(None, words)).replace("|", "\\|")


if __name__ == "__main__":
    print(reference(), end="")

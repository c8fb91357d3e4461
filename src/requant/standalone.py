"""The config of one release: all that it is built from, by itself, and nothing of the machine it was written on."""

from pathlib import PurePosixPath
from typing import Any

from requant.config import Config, Target, source_name
from requant.schemes import SCHEMES


def standalone(config: Config, release: str, keep: list[str] | None = None) -> dict[str, Any]:
    """A whole config that builds `release` alone, every default spelled out; `requant.config.parse` reads it.

    keep: patterns of Linears that stay in BF16, the engine's needs among them; those of the config if None.

    An absolute path, or one of a home directory, is cut to its last component; a relative one stays. A bucket is told
    as a directory of that name.
    """
    settings = config.releases[release]
    model = config.models[settings.model]
    models = [settings.model, *([model.source_model] if model.source_model else [])]
    calibrations = [settings.calibration, *([model.prune.calibration] if model.prune else [])]
    written = settings.model_dump(mode="json", by_alias=True)
    if keep is not None:
        written["keep"] = keep
    if model.prune:
        del written["mtp"]  # a pruned model has no such layers, and a config may not ask for them
    if not SCHEMES[settings.scheme].quantizes:
        del written["tuning"], written["keep"]  # they mean nothing to it
    runs_code = "humaneval" in config.benchmarks[settings.benchmark].served
    return {
        "models": {name: _model(config, name) for name in models},
        "calibrations": {name: _calibration(config, name) for name in dict.fromkeys(calibrations)},
        "benchmarks": {settings.benchmark: _benchmark(config, settings.benchmark)},
        "targets": {settings.deploy.target: _target(config.targets[settings.deploy.target])},
        "releases": {release: written},
        "build": [release],
        "device": config.device,
        **({"sandbox": config.sandbox.model_dump(mode="json")} if runs_code else {}),
    }


def public_path(path: str) -> str:
    """`path` as it may be published: the last component of an absolute one, a relative one without a leading ./"""
    found = PurePosixPath(path)
    return found.name if found.is_absolute() or path.startswith("~") else str(found)


def _cut(section, *keys: str) -> dict[str, Any]:
    """A section as plain data, the paths under `keys` as they may be published."""
    written = section.model_dump(mode="json", by_alias=True)
    return written | {key: public_path(written[key]) for key in keys if written[key] is not None}


def _target(target: Target) -> dict[str, Any]:
    """A target, all of it; the directories of this machine that its container sees as they may be published."""
    written = target.model_dump(mode="json")
    for mount in written["container"]["mounts"]:
        mount["source"] = public_path(mount["source"])
    return written


def _benchmark(config: Config, name: str) -> dict[str, Any]:
    settings = config.benchmarks[name]
    served = {key: _cut(entry, "data") for key, entry in settings.served.items()}
    return _cut(settings, "include_path") | {"served": served}


def _model(config: Config, name: str) -> dict[str, Any]:
    """A model without the keys that are of no use to its kind: `parse` refuses some of them, even empty."""
    written = _cut(config.models[name], "path", "directory")
    if (bucket := written["bucket"]) is not None:
        written |= {"path": PurePosixPath(bucket).name, "bucket": None, "directory": None}
    return {key: value for key, value in written.items() if value is not None}


def _calibration(config: Config, name: str) -> dict[str, Any]:
    settings = config.calibrations[name]
    written = settings.model_dump(mode="json")
    written["sources"] = [_text(source) for source in settings.sources]
    if settings.heldout.sources is not None:
        written["heldout"]["sources"] = [_text(source) for source in settings.heldout.sources]
    return written


def _text(source) -> dict[str, Any]:
    return _cut(source, "path") | {"name": source_name(source)}

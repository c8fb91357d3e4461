"""Linears that an engine takes unpacked, whatever the checkpoint says of them: a release for it has them in BF16.

Some code of engines asks a Linear for its `weight`, which a packed one has not. Which, is a fact of engine and family,
and is written down here with the version and the run that it rests on.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass

from requant.config import Release, Target
from requant.schemes import SCHEMES

MLA = ("deepseek_v3", "deepseek_v32", "kimi_k2")


@dataclass(frozen=True)
class EngineKeep:
    """`engine` loads or serves models of `families` (`model_type`) only with these Linears in BF16.

    pattern: of names, as in a release's `keep`. why: the reason, for records and cards; a changed one makes no block
    stale. basis: the version, and what this rests on.
    """

    engine: str
    families: tuple[str, ...]
    pattern: str
    why: str
    basis: str


KEEPS = (
    EngineKeep(
        "sglang",
        MLA,
        r"\.self_attn\.(q_a_proj|kv_a_proj_with_mqa|q_b_proj|kv_b_proj)$",
        "sglang reads the weight of these projections of MLA by name",
        "0.5.16, run on an H200, sm90: W4A16 with all Linears packed ends when the block is made (no attribute "
        "'weight'), with these in BF16 it loads; NVFP4 by its code",
    ),
    EngineKeep(
        "vllm",
        MLA,
        r"\.self_attn\.kv_b_proj$",
        "vLLM reads the weight of this projection of MLA where a prompt comes in pieces",
        "0.26.0, run on an H200, sm90: W4A16 and NVFP4 with all Linears packed are served until a piece of a prompt "
        "stands behind others, then the engine ends",
    ),
)
_WHY = {keep.pattern: keep.why for keep in KEEPS}


def _needed(model_type: str, target: Target) -> list[EngineKeep]:
    if target.weights == "decoded":
        return []
    return [it for it in KEEPS if it.engine == target.engine and model_type in it.families]


def for_engine(release: Release, model_type: str, target: Target) -> Release:
    """`release` with what the engine of its target needs unpacked in its `keep`, behind its own patterns.

    model_type: of its model's config.json. An engine that is given decoded weights needs nothing.
    """
    if not SCHEMES[release.scheme].quantizes:
        return release
    more = [it.pattern for it in _needed(model_type, target) if it.pattern not in release.keep]
    return release.model_copy(update={"keep": [*release.keep, *more]}) if more else release


def packed_problem(packed: Iterable[str], model_type: str, target: Target) -> str | None:
    """Which of the `packed` Linears of a checkpoint the engine of `target` needs in BF16, and why; None if none."""
    needed = _needed(model_type, target)
    for name in packed:
        for it in needed:
            if re.search(it.pattern, name):
                return f"{name} is packed: {it.why} ({it.basis.partition(',')[0]})"
    return None


def why_kept(pattern: str) -> str:
    """Why a Linear stays in BF16 that this pattern of `keep` means: an engine's need, or that the config says so."""
    return _WHY.get(pattern, f"config: keep {pattern}")


def is_engines(reason: str) -> bool:
    """Whether a Linear stays for an engine, by the reason in a record."""
    return reason in _WHY.values()

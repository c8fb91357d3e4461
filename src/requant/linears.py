"""Which Linears of a model are quantized, and why the others stay in BF16: from names and widths alone, without torch.

Serving engines run some Linears as one: the projections of one input, and all experts of a block. Such a layer has one
format, so a Linear that stays in BF16 takes those along that are fused with it.
"""

import difflib
import re
from collections import Counter
from collections.abc import Iterable, Mapping

from requant.architecture import ALWAYS_KEPT, EXPERT, FUSED
from requant.config import FROM_THE_BEGINNING
from requant.engine_keeps import is_engines, why_kept
from requant.errors import RequantError, brief
from requant.naming import released_name
from requant.schemes import Scheme

OUTSIDE = ("lm_head", "model.embed_tokens")  # never quantized, as routers: to keep them is to say so
NEAREST = 3
ALONG = "fused by engines with"  # how the reason begins of what stays in BF16 because of another Linear


def matches(pattern: str, name: str) -> bool:
    """Whether a pattern of `keep` means the module `name`, which may be spelled as Mixtral's checkpoints do (w1)."""
    find = re.match if pattern.startswith(FROM_THE_BEGINNING) else re.search
    pattern = pattern.removeprefix(FROM_THE_BEGINNING)
    return bool(find(pattern, name) or find(pattern, released_name(name, {"model_type": "mixtral"})))


def choose(widths: Mapping[str, int], scheme: Scheme, keep: Iterable[str]) -> tuple[list[str], dict[str, str]]:
    """(Linears to quantize, sorted; Linears left in BF16, each with the reason) of those whose input widths are given.

    Whole blocks have to be given, names from `model.layers` on. A Linear is kept if it is a router, if a pattern of
    `keep` means it, or if its width is no multiple of the scheme's group; with it what is fused with it; and all are if
    the scheme quantizes nothing.
    """
    if not scheme.quantizes:
        return [], dict.fromkeys(widths, f"scheme {scheme.name} quantizes nothing")
    kept: dict[str, str] = {}
    for name, width in widths.items():
        always = [reason for pattern, reason in ALWAYS_KEPT.items() if re.search(pattern, name)]
        asked = [pattern for pattern in keep if matches(pattern, name)]
        if always:
            kept[name] = always[0]
        elif asked:
            kept[name] = why_kept(asked[0])
        elif width % scheme.group_size:
            kept[name] = f"width {width} is no multiple of the group of {scheme.group_size}"
    for layer in fused_layers(widths):
        staying = [name for name in layer if name in kept]
        if staying:
            leaves = ", ".join(sorted({name.rpartition(".")[2] for name in staying}))
            reason = f"{ALONG} {leaves}: {kept[staying[0]]}"
            kept |= {name: reason for name in layer if name not in kept}
    return sorted(widths.keys() - kept.keys()), {name: kept[name] for name in widths if name in kept}


def fused_layers(linears: Iterable[str]) -> list[list[str]]:
    """The Linears of each layer that engines fuse and that so has one format, of more than one each.

    vLLM and sglang: QKVParallelLinear, MergedColumnParallelLinear, fused_qkv_a_proj of MLA, and FusedMoE, which holds
    all projections of all routed experts of a block.
    """
    layers: dict[tuple[str, object], list[str]] = {}
    for name in linears:
        parent, _, leaf = name.rpartition(".")
        if (expert := EXPERT.fullmatch(name)) is not None:
            layers.setdefault((expert[1], "experts"), []).append(name)
        else:
            for members in FUSED.values():
                if leaf in members:
                    layers.setdefault((parent, members), []).append(name)
    return [layer for layer in layers.values() if len(layer) > 1]


def check_closed(quantized: Iterable[str], linears: Iterable[str]) -> None:
    """Raises RequantError if some Linears of a layer that engines fuse are `quantized` and others are not."""
    quantized = set(quantized)
    for layer in fused_layers(linears):
        packed = [name for name in layer if name in quantized]
        if packed and len(packed) < len(layer):
            left = next(name for name in layer if name not in quantized)
            raise RequantError(
                f"{packed[0]}: is quantized, and {left}, which engines fuse with it, is not; expected all of a fused "
                "layer in one format"
            )


def taken_along(kept: Mapping[str, str]) -> list[str]:
    """What of the Linears that `choose` left in BF16 no `keep` of a config asked for: a sentence a reason."""
    counts = Counter(reason for reason in kept.values() if reason.startswith(ALONG) or is_engines(reason))
    return [f"{count} more Linear{'s' if count > 1 else ''} in BF16: {reason}" for reason, count in counts.items()]


def check_patterns(release: str, keep: Iterable[str], linears: Iterable[str]) -> None:
    """Raises RequantError naming the first pattern of `keep` that means no Linear of a model, and the nearest names."""
    routers = {f"{match[1].rpartition('.')[0]}.gate": None for name in linears if (match := EXPERT.fullmatch(name))}
    names = [*linears, *routers, *OUTSIDE]
    for pattern in keep:
        if not any(matches(pattern, name) for name in names):
            raise RequantError(
                f"releases.{release}.keep: {brief(pattern)} matches no Linear of the model; nearest: "
                f"{', '.join(_nearest(pattern, names))}"
            )


def _nearest(pattern: str, names: Iterable[str]) -> list[str]:
    """The kinds of Linears, numbers as N, that are called most like a pattern."""
    plain = re.sub(r"\\d\+?|\d+|\[[^]]*\]\+?", "N", pattern.removeprefix(FROM_THE_BEGINNING))
    plain = re.sub(r"[\\^$*+?(){}|]", "", plain).strip(".")
    kinds = list(dict.fromkeys(re.sub(r"(?<=\.)\d+(?=\.)", "N", name) for name in names))

    def likeness(kind: str) -> float:
        parts = kind.split(".")
        ends = (".".join(parts[-count:]) for count in range(1, len(parts) + 1))
        of_leaves = difflib.SequenceMatcher(None, plain.rpartition(".")[2], parts[-1]).ratio()
        return max(difflib.SequenceMatcher(None, plain, end).ratio() for end in ends) + of_leaves / 2

    return sorted(kinds, key=lambda kind: -likeness(kind))[:NEAREST]

"""What came of a comparison, for a person: Markdown."""

import pandas as pd

from requant.differences import Comparison, FileDifference, TensorDifference

SHOWN = 20  # rows of a table; the record has them all


def report(found: Comparison) -> str:
    """The outcome in a sentence, the files that differ, and the first of the weights that differ."""
    parts = [f"{_sentence(found)}\n"]
    if found.files:
        parts.append(_table([_file(file) for file in found.files]))
    if found.not_opened:
        parts.append(f"Not opened, for want of the published file: {', '.join(found.not_opened)}\n")
    if found.tensors:
        parts += [_weights(found), _table([_tensor(tensor) for tensor in found.tensors])]
    return "\n".join(parts)


def _sentence(found: Comparison) -> str:
    same = f"{found.files_identical} of {found.files_compared} files have the same bytes"
    if found.outcome != "identical":
        return f"The checkpoint differs, {found.outcome}: {same}."
    if not found.files:
        return f"Identical: {same}."
    return f"Identical checkpoint: {same}; the others only tell of it."


def _weights(found: Comparison) -> str:
    """How many weights differ, where the first is, and how far the worst is off."""
    first, limits = found.tensors[0], found.tolerance
    outside = sum(not tensor.within for tensor in found.tensors)
    where = "outside the blocks" if first.block is None else f"in block {first.block}"
    return (
        f"{len(found.tensors)} of {found.tensors_compared} weights in these shards differ, {outside} of them outside "
        f"of the tolerance (cosine at least {limits.min_cosine:.4g}, at most {limits.max_code_fraction:.0%} of the "
        f"codes, relative error at most {limits.max_relative_error:.2g}). The first is {first.name}, {where}.\n"
    )


def _table(rows: list[dict]) -> str:
    more = f"\n... and {len(rows) - SHOWN} more\n" if len(rows) > SHOWN else ""
    return pd.DataFrame(rows[:SHOWN]).to_markdown(index=False, disable_numparse=True) + "\n" + more


def _file(file: FileDifference) -> dict:
    def short(digest: str | None) -> str:
        return digest[:12] if digest else "-"

    return {
        "file": file.name,
        "part": file.part,
        "rebuilt": file.found,
        "sha256, published": short(file.published_sha256),
        "sha256, rebuilt": short(file.rebuilt_sha256),
    }


def _tensor(tensor: TensorDifference) -> dict:
    return {
        "block": "-" if tensor.block is None else tensor.block,
        "weight": tensor.name,
        "what": ", ".join(tensor.parts) or tensor.found,
        "differing": "-" if tensor.differing is None else tensor.differing,
        "of": tensor.elements,
        "cosine": "-" if tensor.cosine is None else f"{tensor.cosine:.7f}",
        "relative error": "-" if tensor.relative_error is None else f"{tensor.relative_error:.2e}",
        "within": "yes" if tensor.within else "no",
    }

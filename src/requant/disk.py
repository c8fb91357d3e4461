"""Disk that a release takes while it is built: files, their sizes, and whether there is room for those still to come.

Arithmetic on config.json and the config alone, without torch: it runs whenever a build is planned.
"""

import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

from requant.config import Calibration
from requant.errors import RequantError
from requant.sizes import Shaped, file_bytes
from requant.whole import REFUSALS


def heldout_beside(path: str | Path) -> Path:
    """The file of the held-out tokens' hidden states, beside that of the calibration tokens'."""
    return Path(path).with_name(f"heldout_{Path(path).name}")


def tokens_bytes(calibration: Calibration) -> int:
    """Bytes of tokens.safetensors: int32 tokens and their masks."""
    parts = {"calibration": calibration.nsamples, "heldout": calibration.heldout.nsamples}
    tensors = {part: Shaped("I32", (count, calibration.seqlen)) for part, count in parts.items()}
    tensors |= {f"{part}_mask": Shaped("U8", (count, calibration.seqlen)) for part, count in parts.items()}
    return file_bytes(tensors)


def hidden_bytes(calibration: Calibration, width: int) -> int:
    """Bytes of a file of BF16 hidden states of the calibration tokens."""
    return file_bytes({"calibration": Shaped("BF16", (calibration.nsamples, calibration.seqlen, width))})


def heldout_bytes(calibration: Calibration, width: int) -> int:
    """Bytes of a file of BF16 hidden states of the held-out tokens."""
    return file_bytes({"heldout": Shaped("BF16", (calibration.heldout.nsamples, calibration.seqlen, width))})


def reference_files(
    model: str,
    source: str,
    name: str,
    calibration: Calibration,
    config: dict[str, Any],
    ends: bool = True,
    kept: bool = True,
) -> dict[str, int]:
    """Size of each file of tokens and hidden states of a model's reference chain; `name` is the calibration's.

    source: the model that it is pruned from, and whose tokens it has; itself if it is not pruned. ends: whether its
    last block is run. kept: whether all files stay (`keep_hidden_states`); else two are there at a time, at least.
    """
    reference, blocks = f"results/reference/{model}/{name}", range(config["num_hidden_layers"] - (not ends))
    states, width = ["embedded", *(f"hidden_{block}" for block in blocks)], config["hidden_size"]
    files = {f"results/calibration/{source}/{name}/tokens.safetensors": tokens_bytes(calibration)}
    at_once = states if kept else states[:2]
    files |= {f"{reference}/{state}.safetensors": hidden_bytes(calibration, width) for state in at_once}
    return files | {f"{reference}/heldout_{state}.safetensors": heldout_bytes(calibration, width) for state in states}


def chain_files(
    release: str, calibration: Calibration, config: dict[str, Any], chained: bool = True, kept: bool = True
) -> dict[str, int]:
    """Size of each file of hidden states of the release itself; none of one that is not `chained`: it does not
    quantize, or each of its blocks is tuned on the reference chain. kept: as for `reference_files`, of one file."""
    blocks = range((config["num_hidden_layers"] if kept else 1) if chained else 0)
    own = [f"results/{release}/chain/{block}.safetensors" for block in blocks]
    return dict.fromkeys(own, hidden_bytes(calibration, config["hidden_size"]))


def files_to_come(release: str, chain: dict[str, int], blocks: int, stored: int, weight_bits: int) -> dict[str, int]:
    """Files that a build of `release` still has to write, with sizes it can't stay below.

    chain: what `reference_files` and `chain_files` give. A weight takes `weight_bits` in the release at least, and two
    of the `stored` bytes of the source's shards at most. Nothing is to come of a release that has been packed and
    evaluated: its chains may have been deleted since.
    """
    if all(Path(f"results/{release}/{stage}.json").exists() for stage in ("pack", "evaluate")):
        return {}
    each = stored // 2 * weight_bits // 8 // blocks
    files = chain | {f"results/{release}/blocks/{block}.safetensors": each for block in range(blocks)}
    return {path: size for path, size in files.items() if not Path(path).exists()}


def check_room(files: dict[str, int]) -> None:
    """Raises RequantError if a disk has less room than the `files` that are to be written to it.

    Each file counts for the disk that its folder, or the nearest one above that exists, is on.
    """
    needed: dict[int, list[tuple[Path, int]]] = {}
    for path, size in files.items():
        folder = nearest_folder(path)
        needed.setdefault(os.stat(folder).st_dev, []).append((folder, size))
    for found in needed.values():
        folder, total = found[0][0], sum(size for _, size in found)
        free = shutil.disk_usage(folder).free
        if total > free:
            raise RequantError(
                f"{folder.resolve()}: {free / 1e9:.1f} GB free; what is still to be written there takes "
                f"{total / 1e9:.1f} GB at least (`snakemake --cores 1 plan` has it by kind)"
            )


def check_writable(*folders: str | Path) -> None:
    """Raises RequantError naming the first of those `folders` that are there in which no file can be written."""
    for folder in filter(os.path.isdir, folders):
        try:
            with tempfile.TemporaryFile(dir=folder) as file:
                file.write(bytes(4096))
        except OSError as error:
            raise RequantError(
                f"{Path(folder).absolute()}: {os.strerror(error.errno)}; a build writes here: "
                f"{REFUSALS.get(error.errno, 'make the folder writable')}, then run the same command again"
            ) from None


def nearest_folder(path: str | Path) -> Path:
    """The folder of `path`, or the nearest one above it that exists."""
    return next(folder for folder in Path(path).absolute().parents if folder.is_dir())

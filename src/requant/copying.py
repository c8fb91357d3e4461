"""One block of a release in BF16: the source's tensors as they are read, under the names that a release has.

Nothing is tuned or run: neither calibration tokens nor the reference chain are needed to pack such a release.
"""

import time
from pathlib import Path

from requant.checkpoint import Checkpoint
from requant.hashing import file_entry
from requant.jobs import peak_memory_bytes, progress
from requant.naming import released_name
from requant.records import CopiedBlock, KeepList, write_json
from requant.safetensors_io import save
from requant.streamed import StreamedModel


def copy_block(
    source: Path,
    release: str,
    block: int,
    scheme: str,
    out_block: Path,
    out_record: Path,
    keep: KeepList | None = None,
) -> CopiedBlock:
    """Writes the tensors of block `block` of the model in `source`, and their record.

    keep: the experts that a pruned model has of the source. They are the file's own bytes, but as `dtypes` has it: FP8
    weights are decoded to BF16; stacked experts become tensors of their own. Raises RequantError naming the tensors
    that the block lacks or has too many.
    """
    start = time.monotonic()
    model, prefix = StreamedModel(Checkpoint(source, keep)), f"model.layers.{block}."
    tensors = {prefix + name: tensor for name, tensor in model.block(block).state_dict().items()}
    tensors = model.as_released(block, tensors, tensors)
    save(out_block, {released_name(name, model.checkpoint.config): tensor for name, tensor in tensors.items()})
    record = CopiedBlock(
        release=release,
        block=block,
        scheme=scheme,
        tensors=len(tensors),
        seconds=time.monotonic() - start,
        peak_memory_bytes=peak_memory_bytes(),
        sha256=file_entry(out_block).sha256,
    )
    write_json(out_record, record)
    progress(f"{release} block {block} (of {model.blocks}): {len(tensors)} tensors, {record.seconds:.0f} s")
    return record

"""The first blocks of a model as a model of their own: how many, and what config.json says of them.

Arithmetic on config.json and the config alone, without torch: it runs whenever a build is planned.
"""

from collections.abc import Iterable
from typing import Any

from requant.architecture import without_drafting
from requant.errors import RequantError

# A list of block numbers; other lists with "layer" in their key have an entry for each block.
BLOCK_NUMBERS = "mlp_only_layers"


def blocks_to_load(asked: int | None, blocks: int, moe: Iterable[int]) -> int:
    """Blocks of the load test of a model of `blocks` blocks, of which `moe` have experts; 0 if there is none.

    asked: `deploy.load_test_blocks`. If it is None, as many as have one MoE block, of a dense model one. A cut of all
    blocks would be the model itself, which the deploy stage serves: there is none.
    """
    count = min(moe, default=0) + 1 if asked is None else asked
    return count if count < blocks else 0


def check_load_test(release: str, blocks: int) -> None:
    """Raises RequantError if `release` has no load test, one of 0 blocks."""
    if not blocks:
        raise RequantError(
            f"releases.{release}.deploy.load_test_blocks: no load test: switched off, or of all blocks of the model; "
            f"expected a number from 1 to one less than these; or ask for results/{release}/deploy.json"
        )


def cut_config(config: dict[str, Any], blocks: int) -> dict[str, Any]:
    """The config.json of the model's first `blocks` blocks, without multi-token prediction."""
    before = config["num_hidden_layers"]
    changed: dict[str, Any] = {"num_hidden_layers": blocks}
    for key, value in config.items():
        if not isinstance(value, list):
            continue
        if key == BLOCK_NUMBERS:
            changed[key] = [block for block in value if block < blocks]
        elif "layer" in key and len(value) >= before:  # more of them: multi-token prediction, behind the blocks
            changed[key] = value[:blocks]
    return without_drafting(config) | changed

"""What can't work, told before any job starts: by arithmetic on config.json and the config, without torch."""

from collections.abc import Iterable
from typing import Any

from requant.architecture import head_width
from requant.checkpoint import TOKENIZERS
from requant.config import Calibration, Release
from requant.errors import RequantError
from requant.naming import EXPERT_COUNTS
from requant.schemes import SCHEMES

NUMBERS = ("hidden_size", "intermediate_size", "num_attention_heads", "num_hidden_layers", "vocab_size")


def check_numbers(where: str, config: dict[str, Any]) -> None:
    """Raises RequantError, beginning with `where`, naming a number of config.json that no model can have."""
    for key in NUMBERS:
        if not isinstance(config.get(key), int) or config[key] < 1:
            raise RequantError(f"{where}: config.json: {key}: {config.get(key)!r}; expected a number of 1 or more")
    chosen, key = config.get("num_experts_per_tok"), next((key for key in EXPERT_COUNTS if config.get(key)), None)
    if key and isinstance(chosen, int) and chosen > config[key]:
        raise RequantError(
            f"{where}: config.json: num_experts_per_tok: {chosen}; expected {config[key]} or less ({key})"
        )


def check_source(model: str, blocks: Iterable[int | None], count: int, files: Iterable[str]) -> None:
    """Raises RequantError if a model has no tokenizer among its `files`, or of its `count` blocks one without tensors.

    blocks: those that have tensors; None, for tensors of none, doesn't count.
    """
    if missing := sorted(set(range(count)) - set(blocks)):
        raise RequantError(f"models.{model}: block {missing[0]} has no tensors; config.json counts {count} blocks")
    if not set(TOKENIZERS) & set(files):
        raise RequantError(f"models.{model}: no tokenizer; expected {', '.join(TOKENIZERS[:-1])} or {TOKENIZERS[-1]}")


def widths(config: dict[str, Any]) -> dict[str, int]:
    """Input widths of the Linears of a model's blocks, by the keys of config.json that they follow from."""
    heads, hidden = config["num_attention_heads"], config["hidden_size"]
    found = {"hidden_size": hidden}
    for key in ("q_lora_rank", "kv_lora_rank", "moe_intermediate_size"):
        if config.get(key):
            found[key] = config[key]
    if has_dense_blocks(config):
        found["intermediate_size"] = config["intermediate_size"]
    if "v_head_dim" in config:
        return found | {"num_attention_heads x v_head_dim": heads * config["v_head_dim"]}
    return found | {"num_attention_heads x head_dim": heads * head_width(config)}


def has_dense_blocks(config: dict[str, Any]) -> bool:
    """Whether a block has an MLP, or experts, of `intermediate_size`."""
    if not config.get("moe_intermediate_size"):
        return True
    sparse_step = config.get("decoder_sparse_step") or 1
    return bool(config.get("first_k_dense_replace") or config.get("mlp_only_layers") or sparse_step > 1)


def check_group(name: str, release: Release, config: dict[str, Any]) -> None:
    """Raises RequantError if the scheme's group divides no Linear of the model: nothing would be quantized, as meant
    by BF16 alone."""
    if not SCHEMES[release.scheme].quantizes:
        return
    group = SCHEMES[release.scheme].group_size
    found = widths(config)
    if all(width % group for width in found.values()):
        listed = ", ".join(f"{key} {width}" for key, width in found.items())
        raise RequantError(
            f"releases.{name}: scheme {release.scheme} has groups of {group} weights, which divide no width of model "
            f"{release.model!r} ({listed}): nothing would be quantized; expected another scheme"
        )


def check_context(name: str, calibration: Calibration, model: str, config: dict[str, Any]) -> None:
    """Raises RequantError if samples of `calibration`, called `name`, are longer than the model's context."""
    limit = config.get("max_position_embeddings")
    if isinstance(limit, int) and calibration.seqlen > limit:
        raise RequantError(
            f"calibrations.{name}.seqlen: {calibration.seqlen}; expected {limit} or less, the context of model "
            f"{model!r} (config.json: max_position_embeddings)"
        )

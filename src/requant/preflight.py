"""What can't work, told before any job starts: by arithmetic on config.json and the config, without torch."""

from collections.abc import Iterable, Mapping
from typing import Any

from requant import fp8
from requant.architecture import (
    BLOCK_TENSOR,
    DRAFTING,
    DRAFTING_KEYS,
    attention_window,
    block_count,
    drafting_layers,
    family,
    head_width,
)
from requant.carried import TOKENIZERS, check_carried
from requant.checkpoint import Checkpoint
from requant.config import Calibration, Release
from requant.config_json import PARTLY_ROTARY, check_declared
from requant.errors import RequantError, brief
from requant.key_types import check_types
from requant.layout import check_layout
from requant.linears import check_patterns, choose, taken_along
from requant.locks import check_stored
from requant.naming import EXPERT_COUNTS, MOST_EXPERTS, entries, left_out
from requant.records import TensorEntry
from requant.schemes import SCHEMES
from requant.tokenizer import check_convertible

NUMBERS = ("hidden_size", "intermediate_size", "num_attention_heads", "num_hidden_layers", "vocab_size")
LATENT_NUMBERS = (
    "kv_lora_rank",
    "qk_nope_head_dim",
    "qk_rope_head_dim",
    "v_head_dim",
)  # of multi-head latent attention
LARGEST = 2**31 - 1

# Activations and rotary embeddings that transformers knows, with the keys that each of these needs.
ACTIVATIONS = (
    *("gelu", "gelu_10", "gelu_accurate", "gelu_fast", "gelu_new", "gelu_python", "gelu_python_tanh"),
    *("gelu_pytorch_tanh", "hardswish", "laplace", "leaky_relu", "linear", "mish", "quick_gelu", "relu"),
    *("relu2", "relu6", "sigmoid", "silu", "sqrtsoftplus", "swish", "tanh"),
)  # not prelu and xielu: they have weights of their own
OF_TUNED_EXPERTS = ("silu", "swish")
ROPE_KEYS = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "yarn": ("factor",),
    "longrope": ("short_factor", "long_factor"),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
    "proportional": (),
}

AT_LEAST_ONE = ("head_dim", "num_key_value_heads", "decoder_sparse_step", "index_n_heads", "index_head_dim")

# What of a router config.json need not say: transformers' own. Those with groups add up the two best of each.
ROUTING = {
    "deepseek_v3": {"num_experts_per_tok": 8, "n_group": 8, "topk_group": 4},
    "deepseek_v32": {"num_experts_per_tok": 8, "n_group": 8, "topk_group": 4},
    "glm4_moe": {"num_experts_per_tok": 8, "n_group": 1, "topk_group": 1},
    "mixtral": {"num_experts_per_tok": 2},
    "qwen3_moe": {"num_experts_per_tok": 8},
}

ROPE_OPTIONS = ("attention_factor", "beta_fast", "beta_slow", "original_max_position_embeddings")
ROPE_OPTIONS += ("mscale", "mscale_all_dim")

# Numbers that not every family has. Some files write null, or 0, for what a model does without.
OPTIONAL_NUMBERS = {
    "max_position_embeddings": LARGEST,
    "moe_intermediate_size": LARGEST,
    "head_dim": LARGEST,
    "num_key_value_heads": LARGEST,
    "q_lora_rank": LARGEST,
    "kv_lora_rank": LARGEST,
    "qk_nope_head_dim": LARGEST,
    "qk_rope_head_dim": LARGEST,
    "v_head_dim": LARGEST,
    "index_topk": LARGEST,
    "index_n_heads": LARGEST,
    "index_head_dim": LARGEST,
    "first_k_dense_replace": LARGEST,
    "decoder_sparse_step": LARGEST,
    "n_shared_experts": MOST_EXPERTS,
    "num_experts_per_tok": MOST_EXPERTS,
    "n_group": MOST_EXPERTS,
    "topk_group": MOST_EXPERTS,
    **dict.fromkeys(DRAFTING_KEYS, 100),
} | dict.fromkeys(EXPERT_COUNTS, MOST_EXPERTS)


def check_numbers(where: str, config: dict[str, Any]) -> None:
    """Raises RequantError, beginning with `where`, naming a number of config.json that no model can have."""
    latent = config.get("kv_lora_rank") or config.get("v_head_dim")
    for key in (*NUMBERS, *(LATENT_NUMBERS if latent else ())):
        if type(config.get(key)) is not int or not 1 <= config[key] <= LARGEST:
            raise RequantError(
                f"{where}: config.json: {key}: {brief(config.get(key))}; expected a number of 1 or more, "
                f"at most {LARGEST}"
            )
    try:
        block_count(config)
    except RequantError as error:
        raise RequantError(f"{where}: {error}") from None
    for key, largest in OPTIONAL_NUMBERS.items():
        value = config.get(key)
        least = 1 if key in AT_LEAST_ONE else 0
        null = value is None and (key not in config or key != "first_k_dense_replace")
        if not null and not (type(value) is int and least <= value <= largest):
            raise RequantError(
                f"{where}: config.json: {key}: {brief(value)}; expected a number from {least} to {largest}"
            )
    if not config.get("head_dim") and config["hidden_size"] < config["num_attention_heads"]:
        raise RequantError(
            f"{where}: config.json: num_attention_heads: {config['num_attention_heads']}; expected no more than "
            f"hidden_size, {config['hidden_size']}"
        )
    if latent:  # multi-head latent attention: each head has keys of its own, with a rotary part
        for key, of in (("num_key_value_heads", "num_attention_heads"), ("head_dim", "qk_rope_head_dim")):
            if config.get(key) is not None and config.get(of) is not None and config[key] != config[of]:
                raise RequantError(f"{where}: config.json: {key}: {config[key]}; expected {config[of]} ({of})")


def check_routing(where: str, config: dict[str, Any]) -> None:
    """Raises RequantError, beginning with `where`, if a router can't choose as config.json says."""
    key = next((key for key in EXPERT_COUNTS if config.get(key)), None)
    if key is None:
        return

    def refuse(key: str, expected: str) -> RequantError:
        return RequantError(f"{where}: config.json: {key}: {brief(found[key])}; expected {expected}")

    usual = ROUTING.get(family(config), {})
    experts, found = config[key], usual | config
    for chosen, of in (("num_experts_per_tok", key), ("n_group", key), ("topk_group", "n_group")):
        if chosen in found and not (type(found[chosen]) is int and found[chosen] >= 1):
            raise refuse(chosen, "a number of 1 or more")
        if chosen in found and of in found and found[chosen] > found[of]:
            raise refuse(chosen, f"{found[of]} or less ({of})")
    if "n_group" in usual:
        groups, each = found["n_group"], experts // found["n_group"]
        if experts % groups or each < 2:
            raise refuse("n_group", f"a number that shares {experts} experts ({key}) out in groups of two or more")
        if found["num_experts_per_tok"] > found["topk_group"] * each:
            raise refuse("num_experts_per_tok", f"{found['topk_group'] * each} or less, of {each} experts a group")


def check_arithmetic(where: str, config: dict[str, Any]) -> None:
    """Raises RequantError, beginning with `where`, naming a key of config.json of which no model can be built."""
    act = config.get("hidden_act", "silu")
    if act not in ACTIVATIONS:
        raise RequantError(
            f"{where}: config.json: hidden_act: {brief(act)}; expected one of transformers': {', '.join(ACTIVATIONS)}"
        )
    epsilon = config.get("rms_norm_eps", 1e-6)
    if isinstance(epsilon, bool) or not isinstance(epsilon, int | float) or not 0 <= epsilon < 1:
        raise RequantError(f"{where}: config.json: rms_norm_eps: {brief(epsilon)}; expected a number from 0 to 1")
    spread = config.get("initializer_range", 0.0)  # of no use here, but the classes look at it
    if isinstance(spread, bool) or not isinstance(spread, int | float) or not 0 <= spread <= 1:
        raise RequantError(f"{where}: config.json: initializer_range: {brief(spread)}; expected a number from 0 to 1")
    window = config.get("sliding_window")
    if window is not None and not (type(window) is int and window >= 1):
        raise RequantError(
            f"{where}: config.json: sliding_window: {brief(window)}; expected a number of 1 or more, or null"
        )
    pad, vocabulary = config.get("pad_token_id"), config["vocab_size"]
    for key in ("bos_token_id", "eos_token_id"):
        ids = config.get(key)
        for each in ids if isinstance(ids, list) else [ids]:
            if each is not None and not (type(each) is int and 0 <= each < vocabulary):
                raise RequantError(
                    f"{where}: config.json: {key}: {brief(ids)}; expected ids of the vocabulary, less than "
                    f"{vocabulary} (vocab_size)"
                )
    if pad is not None and not (type(pad) is int and -vocabulary <= pad < vocabulary):
        raise RequantError(
            f"{where}: config.json: pad_token_id: {brief(pad)}; expected one of the vocabulary, less than {vocabulary} "
            "(vocab_size), or null"
        )
    width = config.get("qk_rope_head_dim") or head_width(config)
    if width % 2 and family(config) != PARTLY_ROTARY:
        raise RequantError(
            f"{where}: config.json: {'qk_rope_head_dim' if config.get('qk_rope_head_dim') else 'head_dim'}: {width}; "
            "expected an even number: values are rotated in pairs"
        )
    if family(config) == "llama" and config["hidden_size"] % config["num_attention_heads"]:
        raise RequantError(
            f"{where}: config.json: num_attention_heads: {config['num_attention_heads']}; expected a number that "
            f"hidden_size, {config['hidden_size']}, is a multiple of"
        )
    for key in ("rope_parameters", "rope_scaling"):
        _check_rope(f"{where}: config.json: {key}", config.get(key), width)
    _check_positive(f"{where}: config.json: rope_theta", config.get("rope_theta", 10_000.0))


def _check_rope(where: str, rope: Any, width: int) -> None:
    """Raises RequantError, beginning with `where`, if transformers knows no such rotary embedding of `width` values."""
    if rope is None or rope == {}:
        return
    if not isinstance(rope, dict):
        raise RequantError(f"{where}: {brief(rope)}; expected keys and values, or null")
    kind = rope.get("rope_type", rope.get("type", "default"))
    if not isinstance(kind, str) or kind not in ROPE_KEYS:
        raise RequantError(f"{where}: rope_type: {brief(kind)}; expected one of {', '.join(ROPE_KEYS)}")
    if kind == "default" and any(key in rope for keys in ROPE_KEYS.values() for key in keys):
        raise RequantError(f"{where}: {brief(rope)}; expected the rope_type that it is for: as it is, it has no effect")
    if "rope_theta" in rope:
        _check_positive(f"{where}: rope_theta", rope["rope_theta"])
    for key in ROPE_KEYS[kind]:
        value = rope.get(key)
        if isinstance(value, list) and value and key.endswith("_factor"):
            for number in value:
                _check_positive(f"{where}: {key}", number)
            if "partial_rotary_factor" not in rope and len(value) != width // 2:
                raise RequantError(f"{where}: {key}: {len(value)} factors; expected {width // 2}, one for two values")
        else:
            _check_positive(f"{where}: {key}", value)
    for key in ROPE_OPTIONS:
        if rope.get(key) is not None:
            _check_positive(f"{where}: {key}", rope[key])
    if kind == "llama3" and rope["low_freq_factor"] >= rope["high_freq_factor"]:
        raise RequantError(
            f"{where}: low_freq_factor: {rope['low_freq_factor']}; expected less than high_freq_factor, "
            f"{rope['high_freq_factor']}"
        )


def _check_positive(where: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or value <= 0:
        raise RequantError(f"{where}: {brief(value)}; expected a number above 0")


def check_model(where: str, config: dict[str, Any], tensors: dict[str, TensorEntry]) -> None:
    """Raises RequantError if requant can't build the model of this config.json, or read its `tensors`.

    where: the directory or lock that both are from; tensors: by the names in the files.
    """
    check_known(where, config)
    check_stored(where, config, tensors)
    check_outside(where, config, tensors)
    check_behind(where, config, tensors)
    try:
        held = entries(fp8.without_scales(tensors), config)
    except RequantError as error:
        raise RequantError(f"{where}: {error}") from None
    check_layout(where, config, held)


def check_known(where: str, config: dict[str, Any]) -> None:
    """Raises RequantError if config.json alone tells that requant can't build the model, or would compute another."""
    try:
        family(config)
    except RequantError as error:
        raise RequantError(f"{where}: {error}") from None
    check_numbers(where, config)
    check_types(where, config)
    check_routing(where, config)
    check_declared(where, config)
    check_arithmetic(where, config)


def check_behind(where: str, config: dict[str, Any], tensors: Iterable[str]) -> None:
    """Raises RequantError if blocks are stored that config.json counts neither among the model's nor, behind them, as
    layers for multi-token prediction."""
    blocks, layers = block_count(config), drafting_layers(config)
    names = set(tensors)
    names -= left_out(names).keys()
    stored = {int(match[1]) for name in names if (match := BLOCK_TENSOR.fullmatch(name))}
    behind = sorted(block for block in stored if block >= blocks)
    if not behind or (len(behind) <= layers and behind == list(range(blocks, blocks + len(behind)))):
        return
    counted = f"{blocks} blocks"
    if config["model_type"] in DRAFTING:
        counted += f" (num_hidden_layers) and {layers} layers for multi-token prediction (num_nextn_predict_layers)"
    strange = next((block for block in behind if not blocks <= block < blocks + layers), behind[0])
    raise RequantError(f"{where}: model.layers.{strange}.* is stored; config.json counts {counted}")


def check_outside(where: str, config: dict[str, Any], tensors: dict[str, TensorEntry]) -> None:
    """Raises RequantError if embedding, final norm or head are missing or of another shape than config.json gives."""
    width, vocabulary = config["hidden_size"], config["vocab_size"]
    expected = {"model.embed_tokens.weight": [vocabulary, width], "model.norm.weight": [width]}
    if not config.get("tie_word_embeddings") or "lm_head.weight" in tensors:
        expected["lm_head.weight"] = [vocabulary, width]
    for name, shape in expected.items():
        found = tensors[name].shape if name in tensors else "no such tensor"
        if found != shape:
            raise RequantError(
                f"{where}: {name}: {brief(found)} found; config.json gives {shape} (vocab_size, hidden_size)"
            )


def check_source(model: str, blocks: Iterable[int | None], count: int, files: Iterable[str]) -> None:
    """Raises RequantError if a model has no tokenizer among its `files`, or of its `count` blocks one without tensors.

    blocks: those that have tensors; None, for tensors of none, doesn't count.
    """
    if missing := sorted(set(range(count)) - set(blocks)):
        raise RequantError(f"models.{model}: block {missing[0]} has no tensors; config.json counts {count} blocks")
    if not set(TOKENIZERS) & set(files):
        raise RequantError(f"models.{model}: no tokenizer; expected {', '.join(TOKENIZERS[:-1])} or {TOKENIZERS[-1]}")


def check_files(checkpoint: Checkpoint) -> None:
    """Raises RequantError if a file beside the weights of a checkpoint that is here can't be taken along, or no
    tokenizer can be made of what is here."""
    check_carried(checkpoint.directory, checkpoint.carried_files)
    check_convertible(checkpoint)


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


def check_linears(name: str, release: Release, linears: Mapping[str, int]) -> list[str]:
    """What a user should know of the Linears of a release that stay in BF16: a sentence each. linears: input widths.

    Raises RequantError if a pattern of `keep` means none of them, or all stay.
    """
    scheme = SCHEMES[release.scheme]
    if not scheme.quantizes:
        return []
    check_patterns(name, release.keep, linears)
    quantized, kept = choose(linears, scheme, release.keep)
    if not quantized:
        reasons = ", ".join(dict.fromkeys(kept.values())) or "it has none"
        raise RequantError(f"releases.{name}: no Linear of {release.model!r} would be quantized ({reasons})")
    return [f"releases.{name}: {line}" for line in taken_along(kept)]


def check_activation(name: str, release: Release, config: dict[str, Any]) -> None:
    """Raises RequantError if the engine that tunes a release of a model with experts does not know its activation."""
    tuned = SCHEMES[release.scheme].quantizes and release.tuning.iters and release.tuning.engine == "fused"
    if tuned and config.get("hidden_act", "silu") not in OF_TUNED_EXPERTS:
        raise RequantError(
            f"releases.{name}.tuning.engine: 'fused': experts of model {release.model!r} have the activation "
            f"{config['hidden_act']!r} (config.json: hidden_act), fused knows {' and '.join(OF_TUNED_EXPERTS)}; "
            "expected engine: auto_round, or iters: 0"
        )


def check_context(name: str, calibration: Calibration, model: str, config: dict[str, Any]) -> None:
    """Raises RequantError if samples of `calibration`, called `name`, are longer than a model's context, or window."""
    window = attention_window(config)
    if isinstance(window, int) and calibration.seqlen > window:
        raise RequantError(
            f"calibrations.{name}.seqlen: {calibration.seqlen}; expected {window} or less, the attention's window of "
            f"model {model!r} (config.json: sliding_window): blocks are run with full attention"
        )
    limit = config.get("max_position_embeddings")
    if isinstance(limit, int) and calibration.seqlen > limit:
        raise RequantError(
            f"calibrations.{name}.seqlen: {calibration.seqlen}; expected {limit} or less, the context of model "
            f"{model!r} (config.json: max_position_embeddings)"
        )

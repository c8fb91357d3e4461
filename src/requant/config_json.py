"""What config.json says beside numbers, and engines believe: class, router, rotary embedding, head, extra layers.

A source's is held against what requant computes, by transformers' code of the family (`check_declared`): what
contradicts that is refused. A release's says what holds for the release (`release_config`): keys that engines read and
the source has not are written with what was computed. Keys that requant does not know are carried.
"""

from collections.abc import Iterable, Mapping
from typing import Any

from requant.architecture import BLOCK_TENSOR, CAUSAL_CLASSES, DRAFTING, DRAFTING_KEYS, family
from requant.errors import RequantError, brief
from requant.fp8 import QUANTIZED_BY
from requant.naming import EXPERT_COUNTS

# Keys that do not hold for a release: how the source is stored, and code that comes with it.
DROPPED = (*QUANTIZED_BY, "auto_map")
# Names under which a family's class is known too; any name that differs in capitals alone is one (LLaMAForCausalLM).
OTHER_NAMES = {"deepseek_v3": ("KimiK2ForCausalLM",)}
# What the code of a family computes whatever these keys say. vLLM's and sglang's code of DeepSeek-V3 reads them: it
# takes softmax and no correction bias where they are missing, and sglang's ends without moe_layer_freq.
DEEPSEEK = {"scoring_func": "sigmoid", "topk_method": "noaux_tc", "moe_layer_freq": 1}
COMPUTED = {
    "deepseek_v3": DEEPSEEK,
    "deepseek_v32": DEEPSEEK,
    "glm4_moe": {"scoring_func": "sigmoid", "topk_method": "noaux_tc"},
    "mixtral": {"scoring_func": "softmax"},
    "qwen3_moe": {"scoring_func": "softmax"},
}
WRITTEN = ("deepseek_v3", "deepseek_v32")  # families whose releases have these keys in any case
# The key that counts experts by the family's own name: transformers 5 saves Qwen3-MoE's under another alone.
EXPERT_COUNT = {"qwen3_moe": "num_experts", "mixtral": "num_local_experts"}
# What rotary embeddings depend on: transformers 5 saves it under `rope_parameters`, earlier code reads these keys.
ROTARY = ("rope_theta", "partial_rotary_factor")
PARTLY_ROTARY = "glm4_moe"  # the family whose code rotates a part of a head's values


def causal_class(config: dict[str, Any]) -> str:
    """The class that a release of the model names."""
    return CAUSAL_CLASSES[family(config)]


def check_declared(where: str, config: dict[str, Any]) -> None:
    """Raises RequantError, beginning with `where`, naming a key of config.json that contradicts what is computed."""
    _check_class(where, config)
    code = family(config)
    for key, value in COMPUTED.get(code, {}).items():
        if config.get(key) not in (None, value):
            raise RequantError(
                f"{where}: config.json: {key}: {brief(config[key])}; expected {value!r}, which is what transformers' "
                f"code of {code} computes, or no such key"
            )
    counts = {key: config[key] for key in EXPERT_COUNTS if config.get(key) is not None}
    if len(set(map(str, counts.values()))) > 1:
        found = ", ".join(f"{key} {brief(value)}" for key, value in counts.items())
        raise RequantError(f"{where}: config.json: experts: {found}; expected one number")
    counts = {key: config[key] for key in DRAFTING_KEYS if config.get(key) is not None}
    if len(set(map(str, counts.values()))) > 1:
        found = ", ".join(f"{key} {brief(value)}" for key, value in counts.items())
        raise RequantError(f"{where}: config.json: layers for multi-token prediction: {found}; expected one number")
    _check_rotary(where, config)


def _check_class(where: str, config: dict[str, Any]) -> None:
    code, names = family(config), config.get("architectures") or []
    own = CAUSAL_CLASSES[code]
    known = {name.lower() for name in (own, *OTHER_NAMES.get(code, ()))}
    for name in names:
        if name.lower() not in known:
            raise RequantError(
                f"{where}: config.json: architectures: {brief(name)}; expected [{own!r}], a causal language model: a "
                "classifier, a reward model or another family's class has another head, or none"
            )


def _check_rotary(where: str, config: dict[str, Any]) -> None:
    parameters, scaling = config.get("rope_parameters"), config.get("rope_scaling")
    for key, value in (("rope_parameters", parameters), ("rope_scaling", scaling)):
        if value is not None and not isinstance(value, dict):
            raise RequantError(f"{where}: config.json: {key}: {brief(value)}; expected keys and values, or no such key")
    found = {"": {key: config.get(key) for key in ROTARY}}
    for part in (config, parameters or {}, scaling or {}):
        factor = part.get("partial_rotary_factor")
        whole = family(config) != PARTLY_ROTARY
        if factor is not None and (_plain(factor) != 1.0 if whole else not _is_part(factor)):
            expected = "1, as its code rotates all values, or no such key" if whole else "a number above 0, at most 1"
            raise RequantError(f"{where}: config.json: partial_rotary_factor: {brief(factor)}; expected {expected}")
    found |= {"rope_parameters.": _named(parameters), "rope_scaling.": _named(scaling)}
    for key in dict.fromkeys(key for values in found.values() for key in values):
        said = {f"{place}{key}": values[key] for place, values in found.items() if values.get(key) is not None}
        if len(set(map(str, map(_plain, said.values())))) > 1:
            listed = " and ".join(f"{name} {brief(value)}" for name, value in said.items())
            raise RequantError(f"{where}: config.json: {listed}; expected one value: engines read either")


def _named(rotary: dict[str, Any] | None) -> dict[str, Any]:
    """The parameters of a rotary embedding under the names of today."""
    return {"rope_type" if key == "type" else key: value for key, value in (rotary or {}).items()}


def _is_part(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value <= 1


def _plain(value: Any) -> Any:
    """A number as float, so that 10000 is 10000.0."""
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else value


def release_config(config: dict[str, Any], stored: Iterable[str], rotary: Mapping[str, Any]) -> dict[str, Any]:
    """The config.json of a release, without its quantization.

    config: of the model that it stands for. stored: the names of its tensors, those outside of blocks are enough.
    rotary: the rotary embedding's parameters as transformers has them (`rope_parameters` of its config object).
    """
    code, stored = family(config), list(stored)
    written = {key: value for key, value in config.items() if key not in DROPPED}
    written |= {"model_type": code, "architectures": [CAUSAL_CLASSES[code]]}
    written |= {"dtype": "bfloat16", "torch_dtype": "bfloat16"}  # the later and the earlier name
    written["tie_word_embeddings"] = "lm_head.weight" not in stored
    layers = {int(match[1]) for name in stored if (match := BLOCK_TENSOR.fullmatch(name))}
    behind = len({layer for layer in layers if layer >= config["num_hidden_layers"]})
    written |= {key: behind for key in DRAFTING_KEYS if key in config}
    if code in DRAFTING:
        written[DRAFTING_KEYS[0]] = behind  # transformers' class of some families counts one where the key is missing
    if code in WRITTEN:
        written |= {key: value for key, value in COMPUTED[code].items() if config.get(key) is None}
    if (key := EXPERT_COUNT.get(code)) is not None and config.get(key) is None:
        written[key] = next((config[other] for other in EXPERT_COUNTS if config.get(other) is not None), None)
    written |= {key: rotary[key] for key in ROTARY if config.get(key) is None and rotary.get(key) is not None}
    if rotary.get("rope_type", "default") != "default" and config.get("rope_scaling") is None:
        written["rope_scaling"] = {key: value for key, value in rotary.items() if key not in ROTARY}
    return written

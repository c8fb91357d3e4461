"""Which values the keys of config.json may have, from transformers' config classes, without importing them.

They check types strictly, when a model is built, which is in the first job. `python -m requant.key_types` writes the
shipped table from the classes, by family of the code: for each key the types that it may have.
"""

import json
from dataclasses import fields
from functools import cache
from pathlib import Path
from typing import Any

from requant.architecture import FAMILIES, family
from requant.errors import RequantError, brief
from requant.naming import EXPERT_COUNTS
from requant.records import write_text

TABLE = Path(__file__).parent / "schemas/key_types.json"
DTYPES = ("bfloat16", "float16", "float32", "float64", "float8_e4m3fn", "float8_e5m2", "auto")
IS = {
    "null": lambda value: value is None,
    "bool": lambda value: isinstance(value, bool),
    "int": lambda value: type(value) is int,
    "float": lambda value: type(value) in (int, float),  # whole numbers are taken as such: `as_classes_take_it`
    "str": lambda value: isinstance(value, str),
    "dict": lambda value: isinstance(value, dict),
    "list[int]": lambda value: isinstance(value, list) and all(type(each) is int for each in value),
    "list[str]": lambda value: isinstance(value, list) and all(isinstance(each, str) for each in value),
}
CALLED = {
    "null": "null",
    "bool": "true or false",
    "int": "a whole number",
    "float": "a number",
    "str": "a text",
    "dict": "keys and values",
    "list[int]": "a list of whole numbers",
    "list[str]": "a list of texts",
}


def check_types(where: str, config: dict[str, Any]) -> None:
    """Raises RequantError, beginning with `where`, naming a key of config.json that no model of its family can have so.

    A count of blocks has been looked at.
    """
    for key, kinds in _table()["families"][family(config)].items():
        if key in config and not any(IS[kind](config[key]) for kind in kinds):
            expected = " or ".join(CALLED[kind] for kind in kinds)
            raise RequantError(f"{where}: config.json: {key}: {brief(config[key])}; expected {expected}")
    for key in ("dtype", "torch_dtype"):
        said = config.get(key)
        if said is not None and not (isinstance(said, str) and said.removeprefix("torch.") in DTYPES):
            raise RequantError(
                f"{where}: config.json: {key}: {brief(config[key])}; expected one of {', '.join(DTYPES)}"
            )
    for key in ("layer_types", "mlp_layer_types"):
        kinds, blocks = config.get(key), config["num_hidden_layers"]
        right = IS["list[str]"](kinds) and len(kinds) == blocks and set(kinds) <= set(_table()["layer_types"])
        if kinds is not None and not right:
            raise RequantError(
                f"{where}: config.json: {key}: {brief(kinds)}; expected one for each of {blocks} blocks (of "
                f"{', '.join(_table()['layer_types'])}), or null"
            )
    if not all(str(label).isdigit() for label in config.get("id2label") or ()):
        raise RequantError(f"{where}: config.json: id2label: {brief(config['id2label'])}; expected numbers as keys")


def as_classes_take_it(config: dict[str, Any]) -> dict[str, Any]:
    """`config` with 1.0 for a 1 where transformers' class of the family takes no whole number, and without counts of
    experts that are null: one of their names stands for another."""
    types = _table()["families"][family(config)]
    return {
        key: float(value) if type(value) is int and "float" in types.get(key, ()) and "int" not in types[key] else value
        for key, value in config.items()
        if value is not None or key not in EXPERT_COUNTS
    }


@cache
def _table() -> dict[str, Any]:
    return json.loads(TABLE.read_text(encoding="utf-8"))


def of_classes() -> dict[str, Any]:
    """The table, from transformers' classes. Keys of a type that config.json alone can't have are left out."""
    from transformers import CONFIG_MAPPING
    from transformers.configuration_utils import _LEGACY_LAYER_TYPE_REMAP, ALLOWED_LAYER_TYPES

    families = {code: _of_class(CONFIG_MAPPING[code]) for code in sorted(set(FAMILIES.values()))}
    return {"families": families, "layer_types": [*ALLOWED_LAYER_TYPES, *_LEGACY_LAYER_TYPE_REMAP]}


def _of_class(cls: type) -> dict[str, list[str]]:
    names = {"NoneType": "null", "None": "null", "transformers.modeling_rope_utils.RopeParameters": "dict"}
    found = {}
    for field in fields(cls):
        said = field.type.__name__ if isinstance(field.type, type) else str(field.type)
        kinds = [names.get(kind, kind) for kind in said.split(" | ")]
        kinds = list(dict.fromkeys("dict" if kind.startswith("dict[") else kind for kind in kinds))
        if set(kinds) <= IS.keys():
            found[field.name] = kinds
    return dict(sorted(found.items()))


if __name__ == "__main__":
    write_text(TABLE, json.dumps(of_classes(), indent=1) + "\n")

"""The number formats a release can have.

NVFP4: 4-bit floats (e2m1) in groups of 16 with an FP8 (e4m3) scale a group and one FP32 scale a tensor,
weights and activations (compressed-tensors `nvfp4-pack-quantized`).
W<bits>A16: symmetric integers in groups of 128 with one 16-bit scale a group, activations in BF16
(compressed-tensors `pack-quantized`).
BF16: nothing is quantized; every tensor is the source's, an FP8 one decoded to BF16.
"""

from dataclasses import dataclass

from requant.errors import RequantError


@dataclass(frozen=True)
class Scheme:
    """One number format. `group_size` counts weights along the input dimension; 16 bits mean BF16.

    format: what compressed-tensors calls it; None where nothing is quantized.
    """

    name: str
    format: str | None
    weight_bits: int
    group_size: int
    activation_bits: int

    @property
    def quantizes(self) -> bool:
        return self.weight_bits < 16

    @property
    def quantizes_activations(self) -> bool:
        return self.activation_bits < 16

    @property
    def is_nvfp4(self) -> bool:
        return self.format == "nvfp4-pack-quantized"


SCHEMES = {
    scheme.name: scheme
    for scheme in (
        Scheme("NVFP4", "nvfp4-pack-quantized", 4, 16, 4),
        Scheme("W3A16", "pack-quantized", 3, 128, 16),
        Scheme("W4A16", "pack-quantized", 4, 128, 16),
        Scheme("W8A16", "pack-quantized", 8, 128, 16),
        Scheme("BF16", None, 16, 1, 16),
    )
}


def scheme_of(config: dict, where: str) -> Scheme:
    """The scheme that the `quantization_config` of a config.json describes: BF16 if there is none.

    RequantError if it is none of ours.
    """
    quantization = config.get("quantization_config")
    if quantization is None:
        return SCHEMES["BF16"]
    try:
        weights = quantization["config_groups"]["group_0"]["weights"]
        wanted = (quantization["format"], weights["num_bits"], weights["group_size"])
    except (KeyError, TypeError):
        raise RequantError(
            f"{where}: quantization_config: found without weights in config_groups; expected one of compressed-tensors"
        ) from None
    for scheme in SCHEMES.values():
        if scheme.quantizes and (scheme.format, scheme.weight_bits, scheme.group_size) == wanted:
            return scheme
    known = ", ".join(scheme.name for scheme in SCHEMES.values() if scheme.quantizes)
    raise RequantError(f"{where}: quantization_config: {wanted}; expected one of {known}")

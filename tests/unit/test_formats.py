"""The number formats: encoder, independent decoder and public implementations agree."""

import numpy as np
import pytest
import torch
from compressed_tensors.compressors.nvfp4.helpers import unpack_fp4_from_uint8
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32, unpack_from_int32

from requant import decode, int_pack, nvfp4, rows
from requant.encoding import QuantizedWeight, encode, plain_rounding, quantization_config
from requant.errors import RequantError
from requant.packed import decode_parts, decoded_on
from requant.schemes import SCHEMES
from requant.verify import public_decoding, rederived


@pytest.fixture
def weight():
    torch.manual_seed(3)
    return (torch.randn(48, 256) * torch.rand(48, 1)).to(torch.bfloat16)


QUANTIZING = [name for name, scheme in SCHEMES.items() if scheme.quantizes]


def packed(weight, scheme):
    tensor_scale = nvfp4.global_scale(weight.abs().amax()) if scheme.is_nvfp4 else None
    quantized = plain_rounding(weight, tensor_scale, scheme)
    input_scale = torch.tensor([100.0]) if scheme.is_nvfp4 else None
    return {name.removeprefix("x."): t for name, t in encode("x", quantized, input_scale, scheme).items()}, quantized


def test_e4m3_table_is_the_formats():
    every_byte = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float().numpy()
    np.testing.assert_array_equal(decode.E4M3, every_byte)


def test_e2m1_nibbles_are_the_formats():
    packed_bytes = torch.arange(256, dtype=torch.uint8).reshape(16, 16)
    public = unpack_fp4_from_uint8(packed_bytes, 16, 32, torch.float32).numpy()
    np.testing.assert_array_equal(decode.E2M1[decode.nvfp4_codes(packed_bytes.numpy())], public)


def test_nvfp4_rounds_to_nearest_with_ties_to_even():
    values = torch.tensor([[0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 7.0, -0.25, -0.75, -5.0, -0.2, 0.2, 0.3, 4.9, 5.1]])
    ones = torch.ones(1, 1).to(torch.float8_e4m3fn)
    codes = nvfp4.round_to_codes(values, ones, torch.ones(1))
    expected = [0, 1, 1, 2, 2, 4, 4, 6, 0, -1, -4, 0, 0, 0.5, 4, 6]
    assert nvfp4.values(codes, ones, torch.ones(1)).flatten().tolist() == expected
    assert 8 not in codes, "a minus zero would make codes depend on more than the value"


def test_nvfp4_agrees_with_auto_round_on_every_weight(weight):
    from auto_round.data_type.nvfp import calculate_gparam, nv_fp4

    theirs, scales, _ = nv_fp4(weight, global_scale=calculate_gparam(weight))
    tensor_scale = nvfp4.global_scale(weight.abs().amax())
    ours = plain_rounding(weight, tensor_scale, SCHEMES["NVFP4"])
    assert torch.equal(ours.scales.float(), scales.reshape(48, 16))
    assert torch.equal(ours.weight, theirs)


def test_w3_agrees_with_auto_round_on_every_weight(weight):
    from auto_round.data_type.int import quant_tensor_sym

    theirs, scales, _ = quant_tensor_sym(weight, bits=3, group_size=128, scale_dtype=torch.bfloat16)
    ours = plain_rounding(weight, None, SCHEMES["W3A16"])
    assert torch.equal(ours.scales, scales.reshape(48, 2))
    assert torch.equal(ours.weight, theirs)


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 7, 8])
@pytest.mark.parametrize("columns", [1, 5, 9, 31, 32, 33, 72, 128, 200])
def test_integer_packing_is_compressed_tensors(bits, columns):
    """Also where codes straddle words, and where the last word is not full."""
    codes = torch.randint(-(2 ** (bits - 1)), 2 ** (bits - 1), (5, columns), dtype=torch.int8)
    codes[0], codes[1] = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    words = int_pack.pack(codes, bits)
    assert words.is_contiguous() and torch.equal(words, pack_to_int32(codes, bits))
    assert torch.equal(unpack_from_int32(words, bits, torch.Size((5, columns))).to(torch.int8), codes)
    assert torch.equal(int_pack.unpack(words, bits, columns), codes)
    np.testing.assert_array_equal(decode.int_codes(words.numpy(), bits, columns), codes.numpy())


@pytest.mark.parametrize("name", QUANTIZING)
def test_rounding_and_coding_some_rows_at_a_time_changes_no_bit(weight, name, monkeypatch):
    whole, quantized = packed(weight, SCHEMES[name])
    monkeypatch.setattr(rows, "AT_A_TIME", 5 * 256)
    parts, again = packed(weight, SCHEMES[name])
    assert torch.equal(again.weight, quantized.weight) and torch.equal(again.scales.float(), quantized.scales.float())
    for part, tensor in whole.items():
        assert torch.equal(parts[part].view(torch.uint8), tensor.view(torch.uint8)), part
    assert torch.equal(decoded_on("cpu", parts, SCHEMES[name]), quantized.weight)


@pytest.mark.parametrize("name", QUANTIZING)
def test_decoder_and_public_decoder_give_the_encoded_values(weight, name):
    scheme = SCHEMES[name]
    parts, quantized = packed(weight, scheme)
    decoded = torch.from_numpy(decode_parts(parts, scheme))
    assert torch.equal(decoded.to(torch.bfloat16), quantized.weight)
    public = public_decoding(parts, scheme).float()
    assert (public - decoded).abs().max() <= decoded.abs().max() * 2**-7


@pytest.mark.parametrize("name", QUANTIZING)
def test_codes_are_found_again_and_a_changed_code_is_noticed(weight, name):
    scheme = SCHEMES[name]
    parts, _ = packed(weight, scheme)
    assert rederived(parts, decode_parts(parts, scheme), scheme)
    other = decode_parts(parts, scheme)
    parts["weight_packed"] = parts["weight_packed"].clone()
    parts["weight_packed"][0, 0] ^= 1
    assert not rederived(parts, other, scheme)


def test_a_group_of_zeros_decodes_to_zeros():
    weight = torch.zeros(4, 128, dtype=torch.bfloat16)
    weight[:, 64:] = 1.5
    for scheme in (SCHEMES["NVFP4"], SCHEMES["W3A16"]):
        parts, _ = packed(weight, scheme)
        assert decode_parts(parts, scheme)[:, :64].any() == 0


@pytest.mark.parametrize("at_a_time", [1, 200, 2**20])
def test_activations_round_like_auto_round(at_a_time, monkeypatch):
    """However many rows are rounded at a time."""
    from auto_round.data_type.nvfp import nv_fp4_with_static_gs

    monkeypatch.setattr(rows, "AT_A_TIME", at_a_time)
    x = torch.randn(2, 7, 64, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    peak = x.abs().amax().float()
    theirs, _, _ = nv_fp4_with_static_gs(x, tensor_max=peak)
    assert torch.equal(nvfp4.round_activations(x, nvfp4.global_scale(peak)), theirs)
    assert nvfp4.round_activations(x[:0], nvfp4.global_scale(peak)).shape == (0, 7, 64), "an expert without tokens"


@pytest.mark.parametrize("name", QUANTIZING)
def test_quantization_config_is_what_compressed_tensors_reads(name):
    from compressed_tensors.quantization import QuantizationConfig

    read = QuantizationConfig.model_validate(quantization_config(SCHEMES[name], ["lm_head"]))
    weights = read.config_groups["group_0"].weights
    assert (weights.num_bits, weights.group_size, weights.symmetric) == (
        SCHEMES[name].weight_bits,
        SCHEMES[name].group_size,
        True,
    )
    assert read.ignore == ["lm_head"]


@pytest.mark.parametrize(
    ("part", "value", "message"),
    [
        ("weight_global_scale", torch.tensor([0.0]), "weight_global_scale: 0.0"),
        ("weight_global_scale", torch.tensor([float("inf")]), "weight_global_scale: inf"),
        ("weight_scale", torch.full((48, 16), float("nan")).to(torch.float8_e4m3fn), "weight_scale: NaN"),
        ("weight_scale", torch.ones(48, 15).to(torch.float8_e4m3fn), "weight_scale: shape [48, 15]; expected [48, 16]"),
    ],
)
def test_impossible_scales_are_refused(weight, part, value, message):
    parts, _ = packed(weight, SCHEMES["NVFP4"])
    with pytest.raises(RequantError) as error:
        decode_parts(parts | {part: value}, SCHEMES["NVFP4"])
    assert message in str(error.value)


def test_tuned_scales_survive_encoding(weight):
    """Codes follow from weight and scale alone, whatever rounding chose the weight."""
    scheme = SCHEMES["NVFP4"]
    tensor_scale = nvfp4.global_scale(weight.abs().amax())
    scales = (nvfp4.group_scales(weight, tensor_scale).float() * 0.8).to(torch.float8_e4m3fn)
    codes = torch.randint(0, 16, weight.shape, dtype=torch.uint8)
    codes = torch.where(codes == 8, 0, codes).to(torch.uint8)
    grid = nvfp4.values(codes, scales, tensor_scale).to(torch.bfloat16)
    parts = encode("x", QuantizedWeight(grid, scales, tensor_scale), torch.ones(1), scheme)
    np.testing.assert_array_equal(decode.nvfp4_codes(parts["x.weight_packed"].numpy()), codes.numpy())


@pytest.mark.parametrize("scheme", ["NVFP4", "W3A16", "W4A16", "W8A16"])
def test_decoding_by_torch_gives_the_numbers_of_the_independent_decoder(scheme):
    """A GPU decodes by torch; `decode` shares no code with it."""
    from requant.encoding import encode, plain_rounding
    from requant.packed import decode_parts, decoded_by_torch
    from requant.schemes import SCHEMES

    chosen = SCHEMES[scheme]
    weight = torch.randn(24, 256, generator=torch.Generator().manual_seed(3)).to(torch.bfloat16)
    scale = nvfp4.global_scale(weight.abs().amax()) if chosen.is_nvfp4 else None
    tensors = encode("x", plain_rounding(weight, scale, chosen), scale, chosen)
    parts = {name.removeprefix("x."): tensor for name, tensor in tensors.items()}
    assert torch.equal(decoded_by_torch(parts, chosen), torch.from_numpy(decode_parts(parts, chosen)))

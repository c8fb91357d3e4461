"""The `auto_round` engine: AutoRound (SignRound, arXiv 2309.05516), through its public `quantize_block`.

AutoRound sees a model of one decoder block. What it leaves to chance is set here before it starts: one global scale
for each group of projections that engines fuse, an activation maximum for experts that no token reached, and the
seed. What it keeps to itself, the loss at each iteration, is read from its log records.
"""

import logging
import random
from collections.abc import Callable
from contextlib import nullcontext
from importlib.metadata import version

import numpy as np
import torch
from torch import nn

from requant.attention import attention_chosen
from requant.config import Tuning
from requant.encoding import QuantizedWeight
from requant.errors import RequantError
from requant.schemes import Scheme
from requant.tuned import Tuned, check_finite, lowest, settings


class OneBlockModel(nn.Module):
    """A model that consists of one decoder block, as AutoRound wants to be given it."""

    def __init__(self, block: nn.Module, config, directory: str):
        super().__init__()
        self.model = nn.Module()
        self.model.layers = nn.ModuleList([block])
        self.config = config
        self.dtype = torch.bfloat16
        self.name_or_path = directory


class MaskedBlock(nn.Module):
    """A block whose output is zero where `valid` [n, T, 1] is: padding takes no part in the loss."""

    def __init__(self, block: nn.Module):
        super().__init__()
        self.block = block

    def forward(self, hidden_states: torch.Tensor, valid: torch.Tensor, **kwargs) -> torch.Tensor:
        return self.block(hidden_states, **kwargs) * valid.to(hidden_states.dtype)


def tune(
    block: nn.Module,
    model_config,
    directory: str,
    linears: list[str],
    hidden: torch.Tensor,
    targets: torch.Tensor,
    mask: torch.Tensor | None,
    positions: tuple[torch.Tensor, torch.Tensor],
    scheme: Scheme,
    tuning: Tuning,
    seed: int,
    report: Callable[[int, float], None],
    torch_compile: bool = False,
) -> Tuned:
    """Tunes the rounding of the Linears `linears` of `block`, whose weights end up on their grids.

    hidden, targets: BF16 [n, T, width], the block's inputs and the full-precision block's outputs. mask: [n, T],
    1 for tokens that count, or None. Linears carry `weight_global_scale` and `act_max` where the scheme has them.
    report: called with (iteration, loss) as tuning goes on. Raises RequantError if AutoRound leaves one of `linears`
    in 16 bits, NotFinite at a loss that is no number.
    """
    if not scheme.is_nvfp4:
        _check_rows(block, linears)
    from auto_round import AutoRound, SignRoundConfig

    inner = block if mask is None else MaskedBlock(block)
    prefix = "model.layers.0." + ("" if mask is None else "block.")
    kept = [name for name, module in block.named_modules() if isinstance(module, nn.Linear) and name not in linears]
    chosen = settings(scheme, tuning)
    config = SignRoundConfig(
        iters=tuning.iters,
        lr=chosen["lr"],
        minmax_lr=chosen["minmax_lr"],
        momentum=tuning.momentum,
        enable_minmax_tuning=tuning.minmax,
        gradient_accumulate_steps=tuning.gradient_accumulate_steps,
        not_use_best_mse=not tuning.best_mse,
        enable_quanted_input=True,
    )
    losses = LossLog(report)
    logger = logging.getLogger("autoround")
    level = logger.level
    logger.addHandler(losses)
    logger.setLevel(logging.DEBUG)
    try:
        tuner = AutoRound(
            OneBlockModel(inner, model_config, directory),
            tokenizer=_NoTokenizer(),
            trust_remote_code=False,  # its default is True
            scheme=scheme.name,
            alg_configs=config,
            scale_dtype="bf16",
            nsamples=len(hidden),
            seqlen=hidden.shape[1],
            batch_size=tuning.batch_size,
            seed=seed,
            device_map=tuning.device,
            enable_torch_compile=torch_compile,
            layer_config={prefix + name: {"bits": 16, "act_bits": 16} for name in kept},
        )
        tuner.post_init()
        seed_everything(seed)
        samples = [_sample(hidden, mask, positions, row) for row in range(len(hidden))]
        reference = targets if mask is None else targets * mask[..., None].to(targets.dtype)
        on_gpu = torch.device(tuning.device).type == "cuda"
        with attention_chosen(block, torch.device(tuning.device), hidden.shape[1]) if on_gpu else nullcontext():
            tuner.quantize_block(
                inner,
                samples,
                q_input=[row[None] for row in hidden],
                device=tuning.device,
                reference_output=[row[None] for row in reference],
            )
    finally:
        logger.removeHandler(losses)
        logger.setLevel(level)
    if len(losses.values) != tuning.iters:
        raise RequantError(
            f"AutoRound {engine_version()} reported {len(losses.values)} losses; expected {tuning.iters}: "
            "its log records are not those of 0.16.1"
        )
    factor = 1.0 if mask is None else mask.numel() / float(mask.sum())
    found = [loss * factor for loss in losses.values]
    return Tuned(_collect(block, linears, scheme), found, lowest(found, tuning))


def _check_rows(block: nn.Module, linears: list[str]) -> None:
    """AutoRound leaves a Linear in 16 bits whose weight has no multiple of 32 rows, if it is to be integers."""
    for name in linears:
        if (rows := len(block.get_submodule(name).weight)) % 32:
            raise RequantError(
                f"{name}: {rows} rows; AutoRound {engine_version()} makes integers of multiples of 32: add it to "
                "`keep`, or take tuning.engine: fused"
            )


def seed_everything(seed: int) -> None:
    """Seeds every generator that AutoRound draws from, so that a block does not depend on what ran before it."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def engine_version() -> str:
    """The installed AutoRound."""
    return version("auto-round")


class LossLog(logging.Handler):
    """Reads the unrounded loss of each iteration from the arguments of AutoRound's debug records.

    One that is NaN or infinite ends AutoRound's call, by NotFinite.
    """

    def __init__(self, report: Callable[[int, float], None]):
        super().__init__(logging.DEBUG)
        self.values: list[float] = []
        self.report = report

    def emit(self, record: logging.LogRecord) -> None:
        if str(record.msg).startswith("iter %d loss:"):
            iteration, loss = record.args[:2]
            check_finite(float(loss), int(iteration))
            self.values.append(float(loss))
            self.report(int(iteration), float(loss))


class _NoTokenizer:
    """AutoRound asks for a tokenizer of every model object; quantize_block never calls it."""


def _sample(hidden: torch.Tensor, mask: torch.Tensor | None, positions, row: int) -> tuple:
    kwargs = {"position_embeddings": positions}
    if mask is not None:
        kwargs["valid"] = mask[row][None, :, None]
    return (((hidden[row][None],), kwargs),)


def _collect(block: nn.Module, linears: list[str], scheme: Scheme) -> dict[str, QuantizedWeight]:
    tuned = {}
    for name in linears:
        module = block.get_submodule(name)
        linear = getattr(module, "orig_layer", module)
        scales = getattr(linear, "scale", None)
        if scales is None:
            raise RequantError(f"{name}: AutoRound {engine_version()} left it in 16 bits; add it to `keep`")
        weight = linear.weight.detach()
        scales = scales.reshape(weight.shape[0], -1)
        if scheme.is_nvfp4:
            tensor_scale = linear.weight_global_scale.float().reshape(1)
            tuned[name] = QuantizedWeight(weight, scales.to(torch.float8_e4m3fn), tensor_scale)
        else:
            tuned[name] = QuantizedWeight(weight, scales.to(torch.bfloat16))
    return tuned

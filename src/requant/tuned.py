"""What tuning engines share: their settings spelled out, and what they give back."""

import math
from dataclasses import dataclass, field

from requant.config import Tuning
from requant.encoding import QuantizedWeight
from requant.errors import RequantError
from requant.schemes import Scheme


@dataclass(frozen=True)
class Tuned:
    """What tuning a block gave.

    weights: by Linear name in the block. losses: minibatch MSE by iteration. kept: the iteration whose parameters
    `weights` are. judged: MSE over all samples of the iterations that it was chosen from, where it was chosen so.
    """

    weights: dict[str, QuantizedWeight]
    losses: list[float]
    kept: int
    judged: dict[int, float] = field(default_factory=dict)


class NotFinite(RequantError):
    """A loss that is NaN or infinite: an engine stops at it. Which block it is of, its caller knows."""


def check_finite(loss: float, iteration: int, of: str = "loss") -> None:
    """Raises NotFinite unless the loss of an iteration is a number to compare."""
    if not math.isfinite(loss):
        raise NotFinite(f"{of} {loss} at iteration {iteration}; expected a finite number")


def lowest(losses: list[float], tuning: Tuning) -> int:
    """The iteration to keep by minibatches: the first of the lowest loss, or the last."""
    return min(range(len(losses)), key=losses.__getitem__) if tuning.best_mse else len(losses) - 1


def settings(scheme: Scheme, tuning: Tuning) -> dict:
    """Every setting of a tuning run, defaults spelled out."""
    lr = tuning.lr or 1.0 / max(tuning.iters, 1)
    return {
        "iters": tuning.iters,
        "batch_size": tuning.batch_size,
        "gradient_accumulate_steps": tuning.gradient_accumulate_steps,
        "lr": lr,
        "lr_schedule": "linear to 0",
        "minmax": tuning.minmax,
        "minmax_lr": tuning.minmax_lr or lr,
        "momentum": tuning.momentum,
        "optimizer": "SignSGD",
        "loss": "MSE of the block's output",
        "best_mse": tuning.best_mse,
        "judge": "samples" if tuning.judges_by_samples else "minibatch",
        "inputs": tuning.inputs,
        "weight_bits": scheme.weight_bits,
        "group_size": scheme.group_size,
        "activation_bits": scheme.activation_bits,
        "scale_dtype": "float8_e4m3fn" if scheme.is_nvfp4 else "bfloat16",
    }

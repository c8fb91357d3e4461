"""Train the embedded model: a small DeepSeek-V3 that learns the stories and exercises of generate.py.

    python demo/train.py --out demo/model

Writes a checkpoint in the published DeepSeek layout (one tensor for each projection of each expert, BF16,
several shards with an index), the tokenizer beside it, and training.json with what was measured. The same
seed, versions, processor and thread count give the same weights.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from types import MethodType

import tokenizers
import torch
import torch.nn.functional as F
import transformers
from generate import exercises, stories
from safetensors.torch import save_file
from tokenizer import train_tokenizer
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from transformers import AttentionInterface, DeepseekV3Config, DeepseekV3ForCausalLM, GenerationConfig
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3Experts

MAX_LENGTH = 1024


@dataclass(frozen=True)
class Recipe:
    """All choices of the training; lengths in tokens, rates per step."""

    seed: int = 0
    tokens: int = 14_000_000
    rows: int = 16
    row_length: int = 256
    story_share: float = 0.25
    question_weight: float = 0.05
    matrix_rate: float = 3e-3
    vector_rate: float = 3e-3
    weight_decay: float = 0.05
    warmup_share: float = 0.03
    bias_rate: float = 1e-3
    scaling: float = 2.0
    threads: int = 2

    @property
    def steps(self) -> int:
        return self.tokens // (self.rows * self.row_length)


def configuration(tokenizer, recipe: Recipe) -> DeepseekV3Config:
    """A DeepSeek-V3 in small: all Linears take a multiple of 128 features: groups of 16 and of 128 fit."""
    return DeepseekV3Config(
        vocab_size=math.ceil(len(tokenizer) / 32) * 32,
        hidden_size=128,
        num_hidden_layers=6,
        first_k_dense_replace=1,
        intermediate_size=384,
        moe_intermediate_size=128,
        n_routed_experts=16,
        n_shared_experts=1,
        num_experts_per_tok=4,
        n_group=4,
        topk_group=2,
        norm_topk_prob=True,
        routed_scaling_factor=recipe.scaling,
        scoring_func="sigmoid",
        topk_method="noaux_tc",
        moe_layer_freq=1,
        ep_size=1,
        num_nextn_predict_layers=0,
        num_attention_heads=4,
        num_key_value_heads=4,
        q_lora_rank=128,
        kv_lora_rank=128,
        qk_nope_head_dim=32,
        qk_rope_head_dim=32,
        v_head_dim=32,
        max_position_embeddings=tokenizer.model_max_length,
        tie_word_embeddings=False,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


# Text: whole documents one after another; a row starts with a document and cuts off the last one.


def tokenized(tokenizer, parts: Iterator[tuple[str, str]], question_weight: float) -> Iterator[tuple[list, list]]:
    """Ids and loss weights of documents given as (what is asked, what is to be learned)."""
    encode = partial(tokenizer.backend_tokenizer.encode_batch, add_special_tokens=False)
    while True:
        asked, learned = zip(*islice(parts, 256), strict=True)
        for question, answer in zip(encode(asked), encode(learned), strict=True):
            ids = [tokenizer.bos_token_id, *question.ids, *answer.ids, tokenizer.eos_token_id]
            weights = [question_weight] * (1 + len(question.ids)) + [1.0] * (len(answer.ids) + 1)
            yield ids, weights


def batches(tokenizer, recipe: Recipe) -> Iterator[tuple[Tensor, Tensor]]:
    """Token ids and loss weights, both [rows, row_length + 1]; stories get their share of the tokens."""
    told = tokenized(tokenizer, (("", text) for text in stories("train", recipe.seed)), recipe.question_weight)
    drilled = tokenized(
        tokenizer,
        ((exercise.question, f" {exercise.answer}.") for exercise in exercises("train", recipe.seed)),
        recipe.question_weight,
    )
    length = recipe.row_length + 1
    tokens, of_stories = 0, 0
    while True:
        rows, row_weights = [], []
        for _ in range(recipe.rows):
            ids, weights = [], []
            while len(ids) < length:
                story = of_stories <= recipe.story_share * tokens
                more, more_weights = next(told if story else drilled)
                tokens += len(more)
                of_stories += len(more) * story
                ids += more
                weights += more_weights
            rows.append(ids[:length])
            row_weights.append(weights[:length])
        yield torch.tensor(rows), torch.tensor(row_weights)


# Speed: what transformers computes, in fewer and larger operations.


class Gather(torch.autograd.Function):
    """`states[chosen]`, with -1 for a row of zeros; backward gathers through `back`, -1 likewise.

    `back` is [rows of states, times]: where each row went. Unlike the backward of an index, this one adds in
    a fixed order.
    """

    @staticmethod
    def forward(ctx, states: Tensor, chosen: Tensor, back: Tensor) -> Tensor:
        ctx.save_for_backward(back)
        return F.pad(states, (0, 0, 0, 1))[chosen]

    @staticmethod
    def backward(ctx, gradient: Tensor):
        (back,) = ctx.saved_tensors
        return F.pad(gradient, (0, 0, 0, 1))[back].sum(1), None, None


@dataclass(frozen=True)
class Slots:
    """Places for tokens sorted by expert, each expert's padded to a multiple of 128.

    Few different sizes, because the CPU library compiles a kernel for every new one.
    """

    load: Tensor  # [experts]: how many tokens chose each
    sizes: list[int]  # places of each expert
    of_choice: Tensor  # [tokens * top_k]: the place of each choice
    choice: Tensor  # [places]: the choice in each place, -1 where none is


def slots(top_k_index: Tensor, num_experts: int) -> Slots:
    chosen = top_k_index.flatten()
    load = torch.bincount(chosen, minlength=num_experts)
    sizes = (load + 127) // 128 * 128
    order = torch.argsort(chosen, stable=True)
    shift = (sizes.cumsum(0) - sizes) - (load.cumsum(0) - load)
    place = torch.arange(order.numel(), device=order.device) + shift[chosen[order]]
    sizes = sizes.tolist()
    of_choice = torch.empty_like(order).scatter_(0, order, place)
    choice = torch.full((sum(sizes),), -1, device=order.device).scatter_(0, place, order)
    return Slots(load, sizes, of_choice, choice)


def narrow(states: Tensor) -> Tensor:
    """`states` in the dtype of autocast where that is on."""
    device = states.device.type
    return states.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else states


def sorted_experts(
    self: DeepseekV3Experts, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
) -> Tensor:
    """DeepseekV3Experts.forward with one sort in place of a search per expert; keeps `self.load`."""
    top_k = top_k_index.shape[1]
    to = slots(top_k_index, self.num_experts)
    self.load = to.load
    token = torch.where(to.choice < 0, -1, to.choice // top_k)
    states = Gather.apply(narrow(hidden_states), token, to.of_choice.unflatten(0, (-1, top_k)))
    results = []
    weights = zip(narrow(self.gate_up_proj), narrow(self.down_proj), strict=True)
    for rows, (gate_up, down) in zip(states.split(to.sizes), weights, strict=True):
        gate, value = F.linear(rows, gate_up).chunk(2, dim=-1)
        results.append(F.linear(F.silu(gate) * value, down))
    results = Gather.apply(torch.cat(results), to.of_choice, to.choice.unsqueeze(1)).unflatten(0, (-1, top_k))
    return torch.bmm(narrow(top_k_weights).unsqueeze(1), results).squeeze(1).to(hidden_states.dtype)


def even_attention(module, query, key, value, attention_mask, scaling, dropout=0.0, **_) -> tuple[Tensor, None]:
    """Causal attention, values padded to the width of keys: torch has a fused CPU kernel for equal widths."""
    width = value.shape[-1]
    value = F.pad(value, (0, query.shape[-1] - width))
    mixed = F.scaled_dot_product_attention(narrow(query), narrow(key), narrow(value), is_causal=True, scale=scaling)
    return mixed[..., :width].transpose(1, 2).contiguous(), None


def quicken(model: DeepseekV3ForCausalLM) -> list[DeepseekV3Experts]:
    """Let `model` compute the same in the quicker ways above; returns its expert modules, by block."""
    AttentionInterface.register("even", even_attention)
    model.set_attn_implementation("even")
    experts = [module for module in model.modules() if isinstance(module, DeepseekV3Experts)]
    for module in experts:
        module.forward = MethodType(sorted_experts, module)
    return experts


# Optimization.


def orthogonalized(momentum: Tensor) -> Tensor:
    """The nearest semi-orthogonal matrix, about: five Newton-Schulz steps over [..., rows, columns].

    Coefficients of Muon (Jordan et al., 2024, https://kellerjordan.github.io/posts/muon/).
    """
    tall = momentum.shape[-2] > momentum.shape[-1]
    matrix = (momentum.mT if tall else momentum).to(torch.bfloat16)
    matrix = matrix / (matrix.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(5):
        gram = matrix @ matrix.mT
        matrix = 3.4445 * matrix + (-4.7750 * gram + 2.0315 * (gram @ gram)) @ matrix
    return matrix.mT if tall else matrix


class Muon(torch.optim.Optimizer):
    """Muon for matrices and stacks of them; updates of about Adam's size (arXiv 2502.16982)."""

    def __init__(self, parameters: list[nn.Parameter], lr: float, weight_decay: float, momentum: float = 0.95):
        super().__init__(parameters, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            for alike in by_shape(group["params"]):
                gradient = torch.stack([parameter.grad for parameter in alike])
                state = self.state[alike[0]]
                if not state:
                    state["momentum"] = torch.zeros_like(gradient)
                momentum = state["momentum"].lerp_(gradient, 1 - group["momentum"])
                update = orthogonalized(gradient.lerp(momentum, group["momentum"])).to(gradient.dtype)
                rate = group["lr"] * 0.2 * math.sqrt(max(gradient.shape[-2:]))
                for parameter, change in zip(alike, update, strict=True):
                    parameter.mul_(1 - group["lr"] * group["weight_decay"]).add_(change, alpha=-rate)


def by_shape(parameters: list[nn.Parameter]) -> list[list[nn.Parameter]]:
    shapes = dict.fromkeys(parameter.shape for parameter in parameters)
    return [[parameter for parameter in parameters if parameter.shape == shape] for shape in shapes]


def optimizers(model: DeepseekV3ForCausalLM, recipe: Recipe) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside the blocks, AdamW for routers, embeddings, head and norms."""
    matrices, others = [], []
    for name, parameter in model.named_parameters():
        inside = parameter.ndim >= 2 and ".layers." in name and not name.endswith("gate.weight")
        (matrices if inside else others).append(parameter)
    return [
        Muon(matrices, recipe.matrix_rate, recipe.weight_decay),
        torch.optim.AdamW(others, recipe.vector_rate, betas=(0.9, 0.95), weight_decay=0.0),
    ]


def rate_share(step: int, recipe: Recipe) -> float:
    """Linear warm-up, then a cosine down to a hundredth, as a share of the full rate."""
    warmup = max(1, int(recipe.warmup_share * recipe.steps))
    if step < warmup:
        return (step + 1) / warmup
    progress = (step - warmup) / max(1, recipe.steps - warmup)
    return 0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * progress))


def balance(model: DeepseekV3ForCausalLM, experts: list[DeepseekV3Experts], rate: float) -> None:
    """Auxiliary-loss-free balancing (DeepSeek-V3, arXiv 2412.19437, section 2.1.2).

    The choice bias of an expert with less than its share of the tokens rises by `rate`, with more it falls.
    """
    gates = [layer.mlp.gate for layer in model.model.layers if hasattr(layer.mlp, "gate")]
    for gate, expert in zip(gates, experts, strict=True):
        load = expert.load.float()
        gate.e_score_correction_bias += rate * torch.sign(load.mean() - load)


def weighted_loss(logits: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
    losses = F.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), reduction="none")
    return (losses * weights.flatten()).sum() / weights.sum()


def train(
    model: DeepseekV3ForCausalLM, tokenizer, recipe: Recipe, watch: Callable[[int, float, float], None]
) -> list[float]:
    """Train in place; `watch(step, loss, seconds so far)` is called after each step. Returns all losses."""
    device = model.device
    experts = quicken(model)
    steppers = optimizers(model, recipe)
    schedules = [LambdaLR(stepper, partial(rate_share, recipe=recipe)) for stepper in steppers]
    losses = []
    started = time.monotonic()
    model.train()
    for step, (ids, weights) in enumerate(islice(batches(tokenizer, recipe), recipe.steps)):
        ids, weights = ids.to(device), weights.to(device)
        with torch.autocast(device.type, torch.bfloat16):
            logits = model(input_ids=ids[:, :-1], use_cache=False).logits
        loss = weighted_loss(logits, ids[:, 1:], weights[:, 1:])
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for stepper, schedule in zip(steppers, schedules, strict=True):
            stepper.step()
            schedule.step()
        model.zero_grad(set_to_none=True)
        balance(model, experts, recipe.bias_rate * rate_share(step, recipe))
        losses.append(loss.item())
        watch(step, losses[-1], time.monotonic() - started)
    return losses


# The release.


def published(model: DeepseekV3ForCausalLM) -> dict[str, Tensor]:
    """The weights under DeepSeek's published names, one tensor for each projection of each expert.

    BF16, but for the balancing biases: their steps are finer than BF16 near the sums that they correct.
    """
    tensors = {}
    for name, tensor in model.state_dict().items():
        if not name.endswith("e_score_correction_bias"):
            tensor = tensor.to(torch.bfloat16)
        prefix, found, projection = name.partition(".experts.")
        if not found:
            tensors[name] = tensor
            continue
        for number, expert in enumerate(tensor):
            if projection == "down_proj":
                parts = {"down_proj": expert}
            else:
                parts = dict(zip(("gate_proj", "up_proj"), expert.chunk(2), strict=True))
            for part, weight in parts.items():
                tensors[f"{prefix}.experts.{number}.{part}.weight"] = weight
    return {
        name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format) for name, tensor in tensors.items()
    }


def write_shards(tensors: dict[str, Tensor], folder: Path, limit: int = 4_000_000) -> None:
    """Fill shards of at most `limit` bytes of weights in the order of the model, and write their index."""
    shards: list[dict[str, Tensor]] = [{}]
    filled = 0
    for name, tensor in tensors.items():
        if filled + tensor.nbytes > limit:
            shards.append({})
            filled = 0
        shards[-1][name] = tensor
        filled += tensor.nbytes
    shard_of = {}
    for number, shard in enumerate(shards, start=1):
        file = f"model-{number:05}-of-{len(shards):05}.safetensors"
        save_file(shard, folder / file, metadata={"format": "pt"})
        (folder / file).chmod(0o644)
        shard_of |= dict.fromkeys(shard, file)
    index = {
        "metadata": {"total_size": sum(tensor.nbytes for tensor in tensors.values())},
        "weight_map": shard_of,
    }
    write_json(index, folder / "model.safetensors.index.json")


def write_json(content: dict, path: Path) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def account(model: DeepseekV3ForCausalLM, recipe: Recipe, losses: list[float], seconds: float) -> dict:
    """What training.json says: the recipe, what it ran on and what it took."""
    means = [sum(part) / len(part) for part in (losses[at : at + 100] for at in range(0, len(losses), 100))]
    return {
        "recipe": asdict(recipe),
        "steps": len(losses),
        "tokens": len(losses) * recipe.rows * recipe.row_length,
        "seconds": round(seconds, 1),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "loss_by_100_steps": [round(mean, 4) for mean in means],
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "tokenizers": tokenizers.__version__,
        },
    }


def write_release(model: DeepseekV3ForCausalLM, tokenizer, training: dict, folder: Path) -> None:
    """The whole folder: shards and index, config, generation config, tokenizer, training.json."""
    folder.mkdir(parents=True, exist_ok=True)
    write_shards(published(model), folder)
    model.config.architectures = [type(model).__name__]
    model.config.dtype = torch.bfloat16
    model.config.save_pretrained(folder)
    special = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    GenerationConfig(**special, do_sample=False).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    settings = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    settings["tokenizer_class"] = "PreTrainedTokenizerFast"  # the name that older transformers know, too
    write_json(settings, folder / "tokenizer_config.json")
    write_json(training, folder / "training.json")


def report(step: int, loss: float, seconds: float, steps: int) -> None:
    if (step + 1) % 50 == 0 or step + 1 == steps:
        left = seconds / (step + 1) * (steps - step - 1)
        print(f"step {step + 1} of {steps}, loss {loss:.3f}, {left / 60:.0f} min left", flush=True)


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "model", help="folder of the checkpoint")
    parser.add_argument("--seed", type=int, default=Recipe.seed)
    parser.add_argument("--tokens", type=int, default=Recipe.tokens, help="how many tokens to train on")
    given = parser.parse_args(arguments)
    recipe = Recipe(seed=given.seed, tokens=given.tokens)
    torch.set_num_threads(recipe.threads)
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # would cost as much as the training itself
    tokenizer = train_tokenizer(recipe.seed, MAX_LENGTH)
    torch.manual_seed(recipe.seed)
    model = DeepseekV3ForCausalLM(configuration(tokenizer, recipe))
    started = time.monotonic()
    losses = train(model, tokenizer, recipe, partial(report, steps=recipe.steps))
    training = account(model, recipe, losses, time.monotonic() - started)
    write_release(model, tokenizer, training, given.out)


if __name__ == "__main__":
    main(sys.argv[1:])

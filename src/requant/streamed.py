"""Running a model one block at a time: no more than a block and a batch of hidden states is ever in memory.

A block is built on the meta device and filled with its own tensors, straight from the shards that hold them.
The same code runs the source and a packed release: `PackedCheckpoint` hands out decoded weights.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext

import torch
from torch import nn

from requant.architecture import attention_window, block_count, block_of
from requant.attention import attention_chosen
from requant.blocks import empty_block, empty_model, fill
from requant.checkpoint import Checkpoint
from requant.devices import prepare_device
from requant.dtypes import main_dtype, released_dtype, torch_dtype
from requant.errors import RequantError
from requant.grouped import group

EMBEDDING, NORM, HEAD = "model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"


class StreamedModel:
    """A causal language model whose blocks are read when they are run, on `device`; hidden states stay with the CPU."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.bfloat16,
        quantize_activations: bool | str = False,
    ):
        """dtype: of all arithmetic. In float32 the same BF16 weights are run with next to no rounding.

        quantize_activations: what `stream` and `logits_of` do with the inputs of quantized Linears if they aren't told;
        "experts" and "others" round those of routed experts alone, or of all but those.
        """
        self.checkpoint, self.device, self.dtype = checkpoint, torch.device(device), dtype
        self.quantize_activations = quantize_activations
        prepare_device(self.device)
        self.blocks = block_count(checkpoint.config)
        self.empty = empty_model(checkpoint.config)
        self.config = self.empty.config
        self.rotary = type(self.empty.model.rotary_emb)(self.config)
        self._names: dict[int, list[str]] = {}
        for name in sorted(checkpoint.index):
            block = block_of(name, self.blocks)
            if block is not None:
                self._names.setdefault(block, []).append(name)

    def block(self, index: int, quantize_activations: bool | str = False) -> nn.Module:
        """Block `index`, filled and ready to run.

        With `quantize_activations` (packed releases only) the inputs of quantized Linears, all or those that it names,
        are rounded as the release's scheme says. Raises RequantError naming the tensors that the block lacks or has too
        many.
        """
        prefix = f"model.layers.{index}."
        tensors = self.checkpoint.read(self._names.get(index, []), self.device)
        block = fill(
            empty_block(type(self.empty.model.layers[index]), self.config, index),
            {name.removeprefix(prefix): tensor for name, tensor in tensors.items()},
            f"{self.checkpoint.directory}: block {index}",
        )
        if quantize_activations:
            self.checkpoint.round_activations(block, prefix, quantize_activations)
        return self.placed(block)

    def as_released(
        self, index: int, names: Iterable[str], tensors: dict[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        """The tensors `names` of block `index` (whole names) as a release stores them where it quantizes none of them.

        tensors: those that the block computes with; where the files have another dtype than these, and a release too,
        they are read once more.
        """
        described = self.checkpoint.described(self._names.get(index, []))
        main = main_dtype(described.values())
        wanted = {name: torch_dtype(released_dtype(name, described[name].dtype, main)) for name in names}
        other = [name for name, dtype in wanted.items() if tensors[name].dtype != dtype]
        read = self.checkpoint.read(other) if other else {}
        return {name: read[name].to(dtype) if name in read else tensors[name] for name, dtype in wanted.items()}

    def placed(self, block: nn.Module) -> nn.Module:
        """A complete block, ready to run on `device`."""
        block = block.to(self.device) if self.dtype == torch.bfloat16 else block.to(self.device, self.dtype)
        return group(block) if self.device.type == "cuda" else block

    def embed(self, tokens: torch.Tensor) -> torch.Tensor:
        """tokens int [n, T] -> hidden states [n, T, width]."""
        table = self.checkpoint.read([EMBEDDING])[EMBEDDING].to(torch.bfloat16)
        return nn.functional.embedding(tokens.long(), table).to(self.dtype)

    def positions(self, length: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Rotary cosines and sines of positions 0..length-1, [1, length, rotary width]."""
        cosines, sines = self.rotary(torch.empty(1, dtype=self.dtype), torch.arange(length)[None])
        return cosines.detach(), sines.detach()

    @torch.no_grad()
    def run(self, block: nn.Module, hidden: torch.Tensor, batch_size: int = 8) -> torch.Tensor:
        """The block's output for hidden states [n, T, width], `batch_size` samples at a time, causal."""
        output = torch.empty_like(hidden)
        self._check_length(hidden.shape[1])
        positions = tuple(part.to(self.device) for part in self.positions(hidden.shape[1]))
        on_gpu = self.device.type == "cuda"
        with attention_chosen(block, self.device, hidden.shape[1]) if on_gpu else nullcontext():
            for start in range(0, len(hidden), batch_size):
                batch = hidden[start : start + batch_size].to(self.device)
                output[start : start + batch_size] = block(batch, position_embeddings=positions)
        return output

    def head(self) -> Callable[[torch.Tensor], torch.Tensor]:
        """The final norm and the output matrix, as a function of hidden states: float32 logits on `device`."""
        matrix = (
            self.checkpoint.read([self._head_name()])[self._head_name()].to(self.device, torch.bfloat16).to(self.dtype)
        )
        norm = self._norm().to(self.device, self.dtype)

        @torch.no_grad()
        def logits(hidden: torch.Tensor) -> torch.Tensor:
            return nn.functional.linear(norm(hidden.to(self.device)), matrix).float()

        return logits

    def stream(
        self, tokens: torch.Tensor, quantize_activations: bool | str | None = None, skip_block: int | None = None
    ) -> Iterator[torch.Tensor]:
        """Hidden states after the embedding and after each block; a skipped block hands its input on."""
        if quantize_activations is None:
            quantize_activations = self.quantize_activations
        hidden = self.embed(tokens)
        yield hidden
        for index in range(self.blocks):
            if index != skip_block:
                hidden = self.run(self.block(index, quantize_activations), hidden)
            yield hidden

    def logits_of(
        self, tokens: torch.Tensor, quantize_activations: bool | str | None = None, skip_block: int | None = None
    ) -> torch.Tensor:
        """tokens int [n, T] -> float32 logits [n, T, vocabulary]."""
        *_, hidden = self.stream(tokens, quantize_activations, skip_block)
        return self.head()(hidden)

    def whole(self, quantize_activations: bool = False) -> nn.Module:
        """All blocks in memory at once, as a transformers model that can generate: for models that fit."""
        model = empty_model(self.checkpoint.config)
        for index in range(self.blocks):
            model.model.layers[index] = self.block(index, quantize_activations)
        model.model.rotary_emb = self.rotary
        model.model.norm = self._norm()
        tensors = self.checkpoint.read([EMBEDDING, self._head_name()])
        fill(model.model.embed_tokens, {"weight": tensors[EMBEDDING]}, "embedding")
        fill(model.lm_head, {"weight": tensors[self._head_name()]}, "head")
        return model.eval().to(self.device)

    def _check_length(self, length: int) -> None:
        window = attention_window(self.checkpoint.config)
        if window is not None and length > window:
            raise RequantError(
                f"{self.checkpoint.directory}/config.json: sliding_window: {window}; samples have {length} tokens: "
                "blocks are run with full attention; expected samples no longer than the window"
            )

    def _head_name(self) -> str:
        return HEAD if HEAD in self.checkpoint.index else EMBEDDING

    def _norm(self) -> nn.Module:
        norm = type(self.empty.model.norm)(self.config.hidden_size, self.config.rms_norm_eps)
        return fill(norm, {"weight": self.checkpoint.read([NORM])[NORM]}, "final norm")

"""The load test of a release: its first blocks as a checkpoint, served by its engine while the others are made.

An engine that does not read the format, a tensor under a name that it does not know, a scale that it applies the wrong
way: each shows with four blocks as it does with sixty-one, many hours earlier. The answers of so few blocks are no
language, but they are the cut checkpoint's own, token for token, or the engine computes something else.
"""

import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from requant import smoke
from requant.config import Deploy, Target
from requant.engine_client import ask_all, client_of
from requant.engines import serve_at
from requant.errors import RequantError
from requant.gate import close
from requant.jobs import progress
from requant.records import CutAnswer, KeepList, LoadTestRecord, write_json
from requant.replay import TIE_TEXT, Served, agreement_of, disagreements, replay
from requant.served_copy import make_greedy, temporary_folder, why_decoded
from requant.serving import Server, unwinding_on_sigterm
from requant.smoke_texts import choose_prompts, heldout_tokens

if TYPE_CHECKING:
    from requant.packed import PackedCheckpoint
    from requant.streamed import StreamedModel


@dataclass(frozen=True)
class Cut:
    """What is tested: the first `blocks` blocks of a release.

    source: directory of the model; blocks_dir: of the block files and their records; keep: experts that a pruned model
    has of the source, decided for one of these blocks at least.
    """

    release: str
    source: Path
    scheme: str
    blocks_dir: Path
    blocks: int
    keep: KeepList | None = None


def load_test(
    cut: Cut,
    tokens: Path,
    settings: Deploy,
    target: Target,
    folder: Path,
    server_log: Path,
    threads: int,
    out: Path,
) -> LoadTestRecord:
    """Serves the cut at `target`, asks it, holds its answers against its own chain of blocks, and writes the record.

    tokens: the calibration's tokens.safetensors, of which held-out text makes the prompts. `folder` holds what is
    served meanwhile and is gone afterwards. Raises RequantError if a block file is not as it was written, the engine
    does not serve the cut, or answers as another model would; then no further block of the release is started
    (`requant.gate`).
    """
    try:
        record = _tested(cut, tokens, settings, target, folder, server_log, threads)
    except Exception as error:
        found = str(error) if isinstance(error, RequantError) else f"{type(error).__name__}: {error}"
        line = " ".join(found.removeprefix(f"{cut.release}: ").split())
        line = f"load test of {_named(cut)}: {line}; `deploy.load_test_blocks: 0` builds on without it"
        close(out.parent, line)
        raise RequantError(f"{cut.release}: {line}") from error
    write_json(out, record)
    return record


def _named(cut: Cut) -> str:
    return "block 0" if cut.blocks == 1 else f"blocks 0 to {cut.blocks - 1}"


def _tested(
    cut: Cut, tokens: Path, settings: Deploy, target: Target, folder: Path, server_log: Path, threads: int
) -> LoadTestRecord:
    import torch

    from requant.architecture import expert_counts, has_plain_experts
    from requant.packed import PackedCheckpoint
    from requant.packing import pack_first
    from requant.streamed import StreamedModel

    started = time.monotonic()
    torch.set_num_threads(threads)
    with unwinding_on_sigterm(), temporary_folder(folder) as scratch:
        pack_first(cut.source, cut.scheme, cut.blocks_dir, cut.blocks, scratch / "cut", cut.keep)
        checkpoint = PackedCheckpoint(scratch / "cut")
        moe_blocks = len(expert_counts(checkpoint.index, cut.blocks))
        plain_experts = has_plain_experts(checkpoint.places, cut.blocks)
        reason = why_decoded(checkpoint.scheme.format, moe_blocks > 0, target, plain_experts)
        server, served, refusal = _serve_and_ask(
            cut, checkpoint, reason is not None, tokens, settings, target, scratch, server_log, threads
        )
        progress(f"{cut.release}: replaying {sum(len(answer.steps) for answer in served)} tokens of the cut")
        rounds = reason is None and checkpoint.scheme.quantizes_activations and target.engine != "transformers"
        own = StreamedModel(checkpoint, quantize_activations=rounds)
        replay(own, checkpoint.tokenizer(), served)
        agreement = agreement_of(served)
        if agreement < settings.agreement:
            verdict, _, _ = smoke.greedy(served, settings.agreement, lambda: ("", 1.0))
            raise RequantError(f"{verdict.found}; expected {verdict.expected}: the engine serves another model")
        control, control_agreement = find_control(own, served, settings.agreement)
    if control is None:
        progress(f"{cut.release}: warning: these answers do not depend on any one of the blocks: they show no more")
    return LoadTestRecord(
        release=cut.release,
        target=settings.target,
        blocks=cut.blocks,
        moe_blocks=moe_blocks,
        engine=server.engine,
        engine_version=server.version,
        command=server.command,
        environment=server.environment,
        container=server.container,
        weights="the packed blocks as they are" if reason is None else "decoded to BF16",
        why_decoded=reason,
        startup_seconds=server.startup_seconds,
        answers=[
            CutAnswer(
                prompt=answer.prompt,
                answer=answer.steps[-1],
                tokens=len(answer.agrees),
                agreeing=sum(answer.agrees),
                worst_gap=max(answer.gaps),
            )
            for answer in served
        ],
        tokens=sum(len(answer.agrees) for answer in served),
        agreement=agreement,
        agreement_limit=settings.agreement,
        agreement_rule=TIE_TEXT,
        control=control,
        control_agreement=control_agreement,
        other_model_status=refusal,
        verdict="passed",
        seconds=time.monotonic() - started,
    )


def _serve_and_ask(
    cut: Cut,
    checkpoint: "PackedCheckpoint",
    decode: bool,
    tokens: Path,
    settings: Deploy,
    target: Target,
    scratch: Path,
    server_log: Path,
    threads: int,
) -> tuple[Server, list[Served], int]:
    """(the server, by now stopped; its answers; its status for a request that names another model)."""
    from requant.packed import write_decoded

    model = checkpoint.directory
    if decode:
        model = scratch / "decoded"
        progress(f"{cut.release}: decoding {_named(cut)} to BF16")
        write_decoded(checkpoint.directory, model)
    make_greedy(model)
    tokenizer = checkpoint.tokenizer()
    heldout = heldout_tokens(tokens)
    prompts = choose_prompts(tokenizer, heldout, settings.prompts, settings.prompt_tokens)
    progress(f"{cut.release}: starting the engine with {_named(cut)} (log: {server_log})")
    with serve_at(target, model, server_log, threads) as server:
        progress(f"{cut.release}: {server.engine} {server.version} healthy after {server.startup_seconds:.1f} s")
        served = ask_all(cut.release, server, tokenizer, prompts, settings.max_tokens, target.request_seconds)
        with client_of(server, target.request_seconds) as client:
            verdict, status = smoke.wrong_model_name(client, server.model, target.engine)
        if verdict.verdict == "failed":
            raise RequantError(
                f"{verdict.found}; expected {verdict.expected}: the engine serves more than it was given"
            )
        return server, served, status


def find_control(model: "StreamedModel", served: list[Served], limit: float) -> tuple[str | None, float]:
    """(what was left out, agreement without it) of a chain that the answers tell from the cut's, else (None, lowest).

    So few blocks may answer the same whichever of them is left out: that is no fault of the build, but it has to be
    said.
    """
    tokens = sum(len(answer.ids) for answer in served)
    lowest = 1.0
    for block in range(model.blocks):
        agreement = 1 - sum(disagreements(model, served, skip_block=block)) / max(tokens, 1)
        if agreement < limit:
            return f"without block {block}", agreement
        lowest = min(lowest, agreement)
    return None, lowest

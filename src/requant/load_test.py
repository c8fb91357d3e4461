"""The load test of a release: its first blocks as a checkpoint, served by its engine while the others are made.

An engine that does not read the format, a tensor under a name that it does not know, a scale that it applies the wrong
way: each shows with four blocks as it does with sixty-one, many hours earlier. The answers of so few blocks are no
language, but they are the cut checkpoint's own, token for token, or the engine computes something else.
"""

import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from requant import arithmetic, chance, engine_log
from requant.config import Deploy, Target
from requant.engine_client import ask_all, client_of
from requant.engines import serve_at
from requant.errors import RequantError
from requant.gate import close
from requant.jobs import progress
from requant.judging import chain_of
from requant.records import CutAnswer, KeepList, LoadTestRecord, write_json
from requant.replay import TIE_TEXT, Served, agreeing, agreement_of, differing, find_control, replay
from requant.roundings import passed
from requant.served_copy import make_greedy, temporary_folder, why_decoded
from requant.serving import Server, unwinding_on_sigterm
from requant.smoke import Allowed, greedy, wrong_model_name
from requant.smoke_texts import choose_prompts, heldout_tokens

if TYPE_CHECKING:
    from requant.packed import PackedCheckpoint

ADVICE = "the blocks made so far stay: mend that, or choose another deploy.target, and the same command goes on"


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
        log = "" if str(server_log) in line or not server_log.exists() else f" (the engine's log: {server_log})"
        line = f"load test of {_named(cut)}: {line}{log}; {ADVICE}"
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
        computed = arithmetic.observed(checkpoint.scheme, target, reason is not None, engine_log.read(server_log))
        own = chain_of(checkpoint, computed)
        replay(own, checkpoint.tokenizer(), served)
        done = passed(own, [[*answer.prompt_ids, *answer.ids] for answer in served])
        allowed = Allowed(settings.agreement, chance.upper_bound(*differing(done, own.head(), range(len(served)))))
        verdict, control, control_agreement = greedy(
            served, allowed, lambda most: find_control(cut.release, own, served, most)
        )
    if verdict.verdict == "failed":
        raise RequantError(f"{verdict.found}; expected {verdict.expected}: the engine serves another model")
    if verdict.verdict == "not applicable":
        progress(f"{cut.release}: warning: {verdict.reason}: the engine loads these blocks, and they show no more")
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
        arithmetic=computed,
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
        tokens=agreeing(served)[1],
        agreement=agreement_of(served),
        agreement_limit=settings.agreement,
        agreement_least=allowed.least(agreeing(served)[1]),
        agreement_rule=TIE_TEXT,
        differing=allowed.measured,
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
            verdict, status = wrong_model_name(client, server.model, target.engine)
        if verdict.verdict == "failed":
            raise RequantError(
                f"{verdict.found}; expected {verdict.expected}: the engine serves more than it was given"
            )
        return server, served, status

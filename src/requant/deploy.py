"""The smoke test of a release: served by an engine, asked by a client, and shown to be this very model.

That a server answers proves little: a loader that forgets a scale answers too, fluently and wrong. So what is served
is held against requant's own block-by-block chain of the packed checkpoint: its greedy answers token by token, which a
chain with one block left out must not fit, and its log-probabilities of held-out text, which must be as near to the
chain's as rounding lets two right implementations be. The other checks are of the engine: docs/smoke-test.md.

Everything is asked in one run of the engine, the throughput last; then the engine is stopped and the chain is run.
"""

import time
from pathlib import Path
from typing import Any

from requant import arithmetic, decisions, engine_log, smoke
from requant.architecture import has_plain_experts
from requant.config import Deploy, Target
from requant.engines import serve_at
from requant.environment import machine
from requant.errors import RequantError
from requant.jobs import progress
from requant.judging import judge
from requant.questions import Asked, ask_everything
from requant.records import (
    Answer,
    DeployRecord,
    EvaluateRecord,
    FailedAnswer,
    FailedDeployRecord,
    KeepList,
    PackRecord,
    ThroughputRecord,
    read_json,
    write_json,
)
from requant.reference_text import RECORDED
from requant.replay import TIE_TEXT, Served, agreeing, agreement_of, disagreements
from requant.served_copy import check_files, linked_files, served_copy, why_decoded
from requant.serving import Server, unwinding_on_sigterm
from requant.smoke_texts import Texts, choose_texts, heldout_rows, heldout_tokens


def smoke_test(
    release: str,
    source: Path,
    packed: Path,
    manifest: Path,
    evaluated: Path,
    tokens: Path,
    settings: Deploy,
    target: Target,
    folder: Path,
    server_log: Path,
    threads: int,
    out: Path,
    out_throughput: Path,
    keep: KeepList | None = None,
) -> DeployRecord:
    """Serves the release in `packed`, checks that it is the packed checkpoint's model, and writes the records.

    `manifest` is the release's pack.json, `evaluated` its evaluate.json, `tokens` its calibration's tokens.safetensors.
    `folder` holds what is served meanwhile and is gone afterwards. `keep` has the experts that a pruned model has of
    `source`. Raises RequantError if a packed file was changed, the engine does not serve, or a check failed: then
    the verdicts are in deploy.failed.json beside `out`.
    """
    import torch

    from requant.checkpoint import Checkpoint
    from requant.packed import PackedCheckpoint
    from requant.streamed import StreamedModel

    started = time.monotonic()
    torch.set_num_threads(threads)
    made = read_json(manifest, PackRecord)
    check_files(packed, made.files)
    checkpoint = PackedCheckpoint(packed)
    tokenizer = checkpoint.tokenizer()
    heldout = heldout_tokens(tokens)
    reference = read_json(evaluated, EvaluateRecord).reference_text
    if reference.tokens != heldout_rows(heldout, RECORDED):
        raise RequantError(
            f"{evaluated}: reference_text: not the beginning of the held-out tokens in {tokens}; expected those; "
            "delete it to rebuild"
        )
    texts = choose_texts(checkpoint, tokenizer, heldout, settings, target)
    plain_experts = has_plain_experts(checkpoint.places, made.blocks)
    reason = why_decoded(checkpoint.scheme.format, made.moe_blocks > 0, target, plain_experts)
    server, asked = _serve_and_ask(
        release, packed, made, reason is not None, tokenizer, texts, settings, target, folder, server_log, threads
    )
    computed = arithmetic.observed(checkpoint.scheme, target, reason is not None, engine_log.read(server_log))
    progress(f"{release}: the engine computes with {arithmetic.in_words(computed)} ({computed.known_from})")
    judgement = judge(release, checkpoint, computed, texts, asked, settings, reference, tokenizer)
    checks = judgement.checks
    for line in smoke.verdict_lines(checks):
        progress(f"{release}: {line}")
    shared = {
        "release": release,
        "target": settings.target,
        "engine": server.engine,
        "engine_version": server.version,
        "command": server.command,
    }
    rest = {"environment": server.environment, "arithmetic": computed, "checks": checks}
    failed_out = out.with_suffix(".failed.json")
    if any(check.verdict == "failed" for check in checks):
        answers = [
            FailedAnswer(prompt=answer.prompt, answer=answer.steps[-1], agrees=answer.agrees)
            for answer in (*asked.served, *asked.together, *asked.long)
            if answer.steps
        ]
        write_json(failed_out, FailedDeployRecord(**shared, **rest, engine_error=asked.engine_error, answers=answers))
        raise RequantError(f"{smoke.failure_line(release, checks, asked.engine_error)} ({failed_out})")
    if asked.levels_error is not None:
        raise asked.levels_error
    progress(f"{release}: comparing with the source's choices")
    source_differs = disagreements(StreamedModel(Checkpoint(source, keep)), asked.served)
    weights = "the packed checkpoint as it is" if reason is None else "decoded to BF16"
    speed = ThroughputRecord(
        **shared,
        weights=weights,
        threads=threads,
        machine=machine().model_dump(),
        levels=asked.levels,
        **settings.throughput.model_dump(include={"repeats", "warmup", "max_tokens"}),
        seconds=asked.levels_seconds,
    )
    of = agreeing(asked.served)[1]
    record = DeployRecord(
        **shared,
        **rest,
        packed=made.digest,
        container=server.container,
        weights=weights,
        why_decoded=reason,
        startup_seconds=server.startup_seconds,
        answers=[_answer_record(answer, count) for answer, count in zip(asked.served, source_differs, strict=True)],
        tokens=of,
        agreement=agreement_of(asked.served),
        agreement_limit=settings.agreement,
        agreement_least=judgement.allowed.least(of),
        agreement_rule=TIE_TEXT,
        differing=judgement.allowed.measured,
        control=judgement.control,
        control_agreement=judgement.control_agreement,
        other_model_status=asked.other_model_status,
        verdict="passed",
        seconds=time.monotonic() - started,
    )
    write_json(out_throughput, speed)
    write_json(out, record)
    failed_out.unlink(missing_ok=True)
    return record


def _serve_and_ask(
    release: str,
    packed: Path,
    made: PackRecord,
    decode: bool,
    tokenizer: Any,
    texts: Texts,
    settings: Deploy,
    target: Target,
    folder: Path,
    server_log: Path,
    threads: int,
) -> tuple[Server, Asked]:
    """(the server, by now stopped; what it answered)."""
    if decode:
        progress(f"{release}: decoding the weights to BF16")
    with unwinding_on_sigterm(), served_copy(packed, sorted(made.files), folder, decode) as model:
        if texts.labels:
            decisions.lay_out(model, tokenizer, texts.labels)
        progress(f"{release}: starting the engine (log: {server_log})")
        with serve_at(target, model, server_log, threads, linked=linked_files(model)) as server:
            progress(f"{release}: {server.engine} {server.version} healthy after {server.startup_seconds:.1f} s")
            return server, ask_everything(release, server, tokenizer, texts, settings, target)


def _answer_record(answer: Served, source_differs: int) -> Answer:
    return Answer(
        prompt=answer.prompt,
        answer=answer.steps[-1],
        tokens=len(answer.agrees),
        agreeing=sum(answer.agrees),
        worst_gap=max(answer.gaps),
        source_answer_differs=source_differs > 0,
    )

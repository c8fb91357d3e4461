"""The smoke test of a release: served by an engine, asked by a client, and shown to be this very model.

That a server answers proves little: a loader that forgets a scale answers too, fluently and wrong. So the
served tokens are replayed, teacher-forced, through requant's own block-by-block chain of the packed
checkpoint. Greedy decoding has to give the chain's own choice at every token, or one so close that BF16
rounding decides. The same replay through a chain with one block left out must fail, else the test could not
tell a wrong model from a right one.
"""

import contextlib
import json
import shutil
import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import groupby, zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any

from requant.config import Deploy, Target
from requant.engines import serve_at
from requant.errors import RequantError
from requant.hashing import file_entry
from requant.jobs import progress
from requant.records import Answer, DeployRecord, FileEntry, KeepList, PackRecord, read_json, write_json
from requant.safetensors_io import load
from requant.serving import Server, unwinding_on_sigterm

if TYPE_CHECKING:
    import torch
    from openai import OpenAI

    from requant.streamed import StreamedModel

# The engine rounds its logits to BF16, which has 8 significant bits: two logits of size |l| that differ by
# less than 2^-7 |l| may change places. A token within that distance of the chain's best is the same choice.
TIE = 2.0**-7
TIE_TEXT = "served token within 2^-7 |l| of the chain's best logit l: one rounding step of BF16"
ENOUGH = 0.25  # part of the served tokens that has to be told from their text, or the check means little
ROUNDS = 4  # passes through the chain at most; one is enough unless a token's text leaves its id open
RANKED = 256  # candidates for a token whose text leaves its id open
# Why a format is not served as it is; the engine reads the formats that are not here.
WHY_DECODED = {
    "nvfp4-pack-quantized": (
        "no engine computes NVFP4 on a CPU; served this way, activations stay in BF16, while the evaluation rounds "
        "them to NVFP4 as the format does"
    ),
}
WHY_DECODED_MOE = {  # besides, for a mixture of experts
    "nvfp4-pack-quantized": (
        "transformers loads compressed-tensors NVFP4 mixture-of-experts weights without dividing by their "
        "global scale (huggingface/transformers issue 48371), and "
    ),
}
WHY_ASKED = "the config asks for it (`targets`: `weights: decoded`)"


@dataclass
class Served:
    """What the engine made of one prompt: `steps[j]` is the whole text after token j."""

    prompt: str
    prompt_ids: list[int]
    steps: list[str]
    ids: list[int] = field(default_factory=list)  # of the tokens replayed so far
    gaps: list[float] = field(default_factory=list)  # best log-probability minus the served token's, nats
    agrees: list[bool] = field(default_factory=list)
    closed: bool = False  # nothing more can be replayed


def smoke_test(
    release: str,
    source: Path,
    packed: Path,
    manifest: Path,
    tokens: Path,
    settings: Deploy,
    target: Target,
    folder: Path,
    server_log: Path,
    threads: int,
    out: Path,
    keep: KeepList | None = None,
) -> DeployRecord:
    """Serves the release in `packed`, checks that it is the packed checkpoint's model, and writes the record.

    `manifest` is the release's pack.json, `tokens` its calibration's tokens.safetensors. `folder` holds what
    is served meanwhile and is gone afterwards. `keep` has the experts that a pruned model has of `source`. Raises
    RequantError if a packed file was changed, the engine does not serve, answers under another model's name, or
    answers with tokens that this model would not choose.
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
    prompts = choose_prompts(tokenizer, heldout_tokens(tokens), settings.prompts, settings.prompt_tokens)
    reason = why_decoded(checkpoint.scheme.format, made.moe_blocks > 0, target)
    server, served, refusal = _serve_and_ask(
        release, packed, made, reason is not None, tokenizer, prompts, settings, target, folder, server_log, threads
    )
    progress(f"{release}: replaying {sum(len(answer.steps) for answer in served)} served tokens, block by block")
    own = StreamedModel(checkpoint)
    replay(own, tokenizer, served)
    steps, judged = sum(len(answer.steps) for answer in served), sum(len(answer.agrees) for answer in served)
    if judged < steps * ENOUGH:
        raise RequantError(
            f"{release}: {judged} of {steps} served tokens could be told from their text; "
            f"expected {ENOUGH:.0%} or more: raise `deploy.prompts`, or choose other held-out text"
        )
    agreement = agreement_of(served)
    if agreement < settings.agreement:
        raise RequantError(wrong_model(release, served, agreement, settings.agreement))
    control, control_agreement = choose_control(release, own, served, settings.agreement)
    progress(f"{release}: comparing with the source's choices")
    source_differs = disagreements(StreamedModel(Checkpoint(source, keep)), served)
    record = DeployRecord(
        release=release,
        packed=made.digest,
        target=settings.target,
        engine=server.engine,
        engine_version=server.version,
        command=server.command,
        environment=server.environment,
        weights="the packed checkpoint as it is" if reason is None else "decoded to BF16",
        why_decoded=reason,
        startup_seconds=server.startup_seconds,
        answers=[_answer_record(answer, count) for answer, count in zip(served, source_differs, strict=True)],
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
    write_json(out, record)
    return record


def why_decoded(stored_format: str | None, moe: bool, target: Target) -> str | None:
    """Why weights stored in that format are decoded to be served at `target`; None if they are served as they are.

    stored_format: None for BF16, which nothing can be decoded to.
    """
    if stored_format is None:
        return None
    if stored_format in WHY_DECODED:
        return (WHY_DECODED_MOE.get(stored_format, "") if moe else "") + WHY_DECODED[stored_format]
    return WHY_ASKED if target.weights == "decoded" else None


def _serve_and_ask(
    release: str,
    packed: Path,
    made: PackRecord,
    decode: bool,
    tokenizer: Any,
    prompts: list[str],
    settings: Deploy,
    target: Target,
    folder: Path,
    server_log: Path,
    threads: int,
) -> tuple[Server, list[Served], int]:
    """(the server, by now stopped; its answers; its status for a request that names another model)."""
    from requant.packed import write_decoded

    with unwinding_on_sigterm(), temporary_folder(folder) as scratch:
        model = scratch / "model"
        if decode:
            progress(f"{release}: decoding the weights to BF16")
            write_decoded(packed, model)
        else:
            mirror(packed, sorted(made.files), model)
        make_greedy(model)
        progress(f"{release}: starting the engine (log: {server_log})")
        with serve_at(target, model, server_log, threads) as server:
            progress(f"{release}: {server.engine} {server.version} healthy after {server.startup_seconds:.1f} s")
            served = ask_all(release, server, tokenizer, prompts, settings.max_tokens, target.request_seconds)
            return server, served, refused_status(release, server, target.request_seconds)


def mirror(packed: Path, names: list[str], folder: Path) -> None:
    """Lays the files `names` of `packed` out in `folder`: shards as links, the others as copies that may be edited."""
    folder.mkdir()
    for path in (packed / name for name in names):
        if path.suffix == ".safetensors":
            (folder / path.name).symlink_to(path.resolve())
        else:
            shutil.copyfile(path, folder / path.name)


def heldout_tokens(path: Path) -> "torch.Tensor":
    """Held-out token ids [m, seqlen] of a token file, -1 where padded."""
    tokens = load(path)
    return tokens["heldout"].masked_fill(tokens["heldout_mask"] == 0, -1)


def check_files(directory: str | Path, files: dict[str, FileEntry]) -> None:
    """Compares the packed files with what `pack` recorded: what is served must be what was verified."""
    for name, expected in sorted(files.items()):
        path = Path(directory) / name
        found = file_entry(path) if path.is_file() else None
        if found != expected:
            raise RequantError(
                f"{path}: {f'sha256 {found.sha256[:16]}...' if found else 'not there'}; expected "
                f"{expected.sha256[:16]}... as packed: the file was changed since; run `pack` again"
            )


@contextlib.contextmanager
def temporary_folder(path: str | Path) -> Iterator[Path]:
    """An empty folder of a fixed name, gone afterwards; what a killed job left there is removed first."""
    path = Path(path)
    shutil.rmtree(path, ignore_errors=True)
    path.mkdir(parents=True)
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)


def make_greedy(directory: Path) -> None:
    """Leaves only token ids in generation_config.json: penalties would hide the model's own choice."""
    path = directory / "generation_config.json"
    if path.exists():
        settings = json.loads(path.read_text(encoding="utf-8"))
        ids = {key: value for key, value in settings.items() if key.endswith("_token_id")}
        path.write_text(json.dumps(ids, sort_keys=True), encoding="utf-8")


def choose_prompts(tokenizer: Any, heldout: "torch.Tensor", count: int, length: int) -> list[str]:
    """Beginnings of held-out documents: at most `length` tokens, and two thirds of the document.

    heldout [m, seqlen], negative where padded. An engine tokenizes the text it is sent: a document that was
    cut inside a word comes back as other tokens than it was, and is passed over. The first document of each
    sample comes first, then the second ones. RequantError if none survives.
    """
    documents = [_documents(row, set(tokenizer.all_special_ids)) for row in heldout.tolist()]
    prompts: list[str] = []
    for document in (document for rank in zip_longest(*documents, fillvalue=()) for document in rank):
        ids = list(document[: min(length, len(document) * 2 // 3)])
        text = tokenizer.decode(ids)
        if ids and text not in prompts and tokenizer(text, add_special_tokens=False)["input_ids"] == ids:
            prompts.append(text)
        if len(prompts) == count:
            break
    if not prompts:
        raise RequantError(
            f"held-out tokens: none of {sum(map(len, documents))} documents begins with tokens that survive "
            "decoding and tokenizing again; expected documents of 2 tokens or more, and a tokenizer that "
            "reads its own text"
        )
    return prompts


def _documents(row: list[int], special: set[int]) -> list[list[int]]:
    """The runs of ordinary tokens between special ones and padding."""
    ordinary = groupby(row, key=lambda token: token >= 0 and token not in special)
    return [list(run) for is_text, run in ordinary if is_text]


def ask_all(
    release: str, server: Server, tokenizer: Any, prompts: list[str], max_tokens: int, seconds: float
) -> list[Served]:
    """Asks the engine for a greedy continuation of each prompt."""
    from openai import OpenAIError

    served = []
    with _client(server, seconds) as client:
        for number, prompt in enumerate(prompts, 1):
            try:
                answer = ask(client, server.model, tokenizer, prompt, max_tokens)
            except OpenAIError as error:
                raise RequantError(
                    f"{release}: prompt {number} of {len(prompts)}: {type(error).__name__}: {error}; "
                    f"expected an answer within {seconds:g} s: see the engine's log, or raise the target's "
                    "`request_seconds`"
                ) from error
            progress(f"{release}: answer {number} of {len(prompts)}: {len(answer.steps)} tokens")
            served.append(answer)
    return served


def ask(client: "OpenAI", model: str, tokenizer: Any, prompt: str, max_tokens: int) -> Served:
    """One prompt through /v1/completions, at temperature 0.

    The API returns text, not ids. Streaming shows the text token by token, except where a token completes no
    character or is a special one. Then the prompt is asked again with every smaller limit: greedy answers are
    prefixes of each other. Raises RequantError if the engine read another prompt than this tokenizer does.
    """
    prompt_ids = tokenizer(prompt)["input_ids"]
    pieces, read, written = _stream(client, model, prompt, max_tokens)
    if read != len(prompt_ids):
        raise RequantError(
            f"{model}: the engine read {read} prompt tokens; expected {len(prompt_ids)}: its tokenizer is "
            "not the release's"
        )
    end_of_text = written < max_tokens  # the last token shows no text
    if len(pieces) + end_of_text == written:
        steps = ["".join(pieces[: number + 1]) for number in range(written)]
    else:
        steps = ["".join(_stream(client, model, prompt, limit)[0]) for limit in range(1, written)] + ["".join(pieces)]
    return Served(prompt, prompt_ids, steps)


def _stream(client: "OpenAI", model: str, prompt: str, max_tokens: int) -> tuple[list[str], int, int]:
    """(pieces of text, prompt tokens, tokens written)."""
    pieces, usage = [], None
    request = {"model": model, "prompt": prompt, "max_tokens": max_tokens, "temperature": 0}
    for chunk in client.completions.create(**request, stream=True):
        pieces += [choice.text for choice in chunk.choices if choice.text]
        usage = chunk.usage or usage
    if usage is None:
        raise RequantError(f"{model}: the engine's stream ended without `usage`; expected it in the last chunk")
    return pieces, usage.prompt_tokens, usage.completion_tokens


def refused_status(release: str, server: Server, seconds: float) -> int:
    """HTTP status for a request that names another model; RequantError if it is answered."""
    from openai import APIStatusError

    other = f"{server.model}-of-another-name"
    with _client(server, seconds) as client:
        try:
            client.completions.create(model=other, prompt="a", max_tokens=1)
            status = 200
        except APIStatusError as error:
            status = error.status_code
    if not 400 <= status < 500:
        raise RequantError(
            f"{release}: status {status} for model {other!r}; expected a refusal, 4xx: the engine serves "
            "more than it was given"
        )
    return status


def _client(server: Server, seconds: float) -> "OpenAI":
    """A client for the loopback alone: no proxy, no key of the caller, no retry that hides a failure."""
    from openai import DefaultHttpxClient, OpenAI

    return OpenAI(
        base_url=f"{server.url}/v1",
        api_key="none",
        organization="",
        project="",
        timeout=seconds,
        max_retries=0,
        http_client=DefaultHttpxClient(trust_env=False),
    )


def replay(model: "StreamedModel", tokenizer: Any, served: list[Served]) -> None:
    """Finds the ids of the served tokens and how `model` likes them; fills `ids`, `gaps` and `agrees`.

    Each pass feeds prompt and answer. Where a token's text fits several ids, the likeliest one that fits is
    taken; if the pass was fed another one, the tokens after it wait for the next pass. Answers that are not
    read to their end after ROUNDS passes count as far as they were read.
    """
    text_ids = _ids_by_text(tokenizer)
    for _ in range(ROUNDS):
        open_answers = [answer for answer in served if not answer.closed]
        if not open_answers:
            return
        rows = [answer.prompt_ids + answer.ids + _guesses(answer, text_ids) for answer in open_answers]
        for answer, row, logits in zip(open_answers, rows, _logits(model, rows), strict=True):
            _follow(answer, row, logits, tokenizer)


def _follow(answer: Served, row: list[int], logits: "torch.Tensor", tokenizer: Any) -> None:
    """Judges the tokens of `answer` as far as `row`, which was fed, is right. logits [len(row), vocab]."""
    while len(answer.ids) < len(answer.steps):
        position = len(answer.prompt_ids) + len(answer.ids)
        if position > len(row) or row[len(answer.prompt_ids) : position] != answer.ids:
            return
        scores = logits[position - 1].log_softmax(-1)
        ranked = scores.topk(min(RANKED, len(scores))).indices.tolist()
        fitting = (token for token in [*ranked, *row[position : position + 1]] if _fits(answer, token, tokenizer))
        token = next(fitting, None)
        judged = ranked[-1] if token is None else token
        answer.gaps.append(float(scores[ranked[0]] - scores[judged]))
        answer.agrees.append(token is not None and _ties(logits[position - 1], token))
        if token is None:  # unknown, so nothing after it can be replayed
            break
        answer.ids.append(token)
    answer.closed = True


def _ties(logits: "torch.Tensor", token: int) -> bool:
    """Whether `token` is the best of logits [vocab], or as good as BF16 can tell."""
    best = float(logits.max())
    return best - float(logits[token]) <= TIE * abs(best)


def _fits(answer: Served, token: int, tokenizer: Any) -> bool:
    """Whether the answer reads on as it was served, if its next token is `token`."""
    from tokenizers.decoders import DecodeStream

    stream, text = DecodeStream([], skip_special_tokens=True), ""
    try:
        for id in [*answer.ids, token]:
            text += stream.step(tokenizer.backend_tokenizer, id) or ""
    except Exception:  # the tokenizers library raises bare Exception for ids that no text can hold
        return False
    return text == answer.steps[len(answer.ids)]


def _ids_by_text(tokenizer: Any) -> dict[str, int]:
    """A token for each text that one token can add to an answer."""
    backend = tokenizer.backend_tokenizer
    before = backend.encode("a", add_special_tokens=False).ids[:1]
    skipped = len(backend.decode(before))
    texts = backend.decode_batch([[*before, id] for id in range(len(tokenizer))])
    return {text[skipped:]: id for id, text in reversed(list(enumerate(texts)))}


def _guesses(answer: Served, text_ids: dict[str, int]) -> list[int]:
    """Ids for the rest of the answer, up to the first token whose text tells nothing."""
    guesses: list[int] = []
    for place in range(len(answer.ids), len(answer.steps)):
        before = answer.steps[place - 1] if place else ""
        added = answer.steps[place][len(before) :]
        if not added or added not in text_ids:
            break
        guesses.append(text_ids[added])
    return guesses


def _logits(model: "StreamedModel", rows: list[list[int]], skip_block: int | None = None) -> list["torch.Tensor"]:
    """float32 logits [len(row), vocab] for each row; padding on the right changes nothing before it."""
    import torch

    longest = max(map(len, rows))
    tokens = torch.tensor([row + [0] * (longest - len(row)) for row in rows])
    logits = model.logits_of(tokens, skip_block=skip_block)
    return [part[: len(row)] for part, row in zip(logits, rows, strict=True)]


def agreement_of(served: list[Served]) -> float:
    """Part of the replayed tokens that agree."""
    judged = [agrees for answer in served for agrees in answer.agrees]
    return statistics.fmean(judged) if judged else 0.0


def disagreements(model: "StreamedModel", served: list[Served], skip_block: int | None = None) -> list[int]:
    """For each answer the number of its tokens that `model` would not have chosen."""
    rows = [answer.prompt_ids + answer.ids for answer in served]
    counts = []
    for answer, row, logits in zip(served, rows, _logits(model, rows, skip_block), strict=True):
        first = len(answer.prompt_ids)
        counts.append(sum(not _ties(logits[place - 1], row[place]) for place in range(first, len(row))))
    return counts


def choose_control(release: str, model: "StreamedModel", served: list[Served], limit: float) -> tuple[str, float]:
    """(what was left out, agreement without it) for a chain that the test tells from the served model.

    The middle block first. A model may hardly need one of its blocks, so the others follow, from the middle
    outwards. RequantError if the answers fit every one of these wrong models: then they prove nothing.
    """
    tokens = sum(len(answer.ids) for answer in served)
    middle = model.blocks // 2
    lowest = 1.0
    for block in sorted(range(model.blocks), key=lambda index: abs(index - middle)):
        progress(f"{release}: control: replaying without block {block} (of {model.blocks})")
        agreement = 1 - sum(disagreements(model, served, skip_block=block)) / tokens
        if agreement < limit:
            return f"without block {block}", agreement
        lowest = min(lowest, agreement)
    raise RequantError(
        f"{release}: the {tokens} served tokens fit the model without any one of its blocks too (agreement "
        f"{lowest:.3f} or more); expected less than {limit}: the test is blind: raise `deploy.prompts` or "
        "`deploy.max_tokens`"
    )


def _answer_record(answer: Served, source_differs: int) -> Answer:
    return Answer(
        prompt=answer.prompt,
        answer=answer.steps[-1],
        tokens=len(answer.agrees),
        agreeing=sum(answer.agrees),
        worst_gap=max(answer.gaps),
        source_answer_differs=source_differs > 0,
    )


def wrong_model(release: str, served: list[Served], agreement: float, limit: float) -> str:
    """The error of a release whose answers are another model's."""
    worst = min(served, key=lambda answer: statistics.fmean(answer.agrees))
    tokens = sum(len(answer.agrees) for answer in served)
    return (
        f"{release}: {agreement:.3f} of {tokens} served tokens are what the packed checkpoint itself would "
        f"choose; expected at least {limit}: the engine serves another model than it was given (worst "
        f"answer: {worst.steps[-1][:60]!r})"
    )

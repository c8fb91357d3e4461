"""The JSON files that stages write and the card reads: one closed schema each.

A number on the card is a field of one of these records, written by the job that measured it.
Units stand in the field names or descriptions; tensors are named as in the checkpoint.
"""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from requant.errors import RequantError, plain
from requant.untrusted import json_object, open_file
from requant.whole import written_whole

COMPUTES = False  # the schema of records, checked when they are read: a new field must not cost hours of tuning


class Record(BaseModel):
    """A JSON file or a part of one: closed, so that a renamed field is an error and not a silent gap."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)


class StageRecord(Record):
    """A JSON file that a stage writes for later ones: with a digest of its text, so that a flipped bit is found."""


class FileEntry(Record):
    size: int = Field(description="bytes")
    sha256: str


class CheckedFile(FileEntry, StageRecord):
    """results/source/{model}/files/{file}.json: a file of a source, as found."""

    tensors: dict[str, str] = Field(
        {}, description="of a shard: XXH3 of each tensor, against which each reading is held"
    )
    seconds: float = Field(description="of hashing and comparing")


class TensorEntry(Record):
    dtype: str = Field(description="safetensors name of the dtype: BF16, F32, F8_E4M3, ...")
    shape: list[int]
    shard: str
    offset: int = Field(description="first byte of the tensor in its shard, header included")


class Lock(Record):
    """What a model is: every file and tensor, and the config. locks/{model}.json."""

    model: str
    revision: str = Field(description="commit of a hub repository; for a local path the sha256 over its files' hashes")
    files: dict[str, FileEntry]
    tensors: dict[str, TensorEntry]
    config: dict[str, Any]
    left_behind: list[str] = Field(
        [], description="what else is there, and neither is read nor goes along; folders end in /"
    )


LEFT_OUT_TEXT = (
    "tensors of the source's files that are no part of the model, with the reason: neither counted nor released"
)


class SourceRecord(StageRecord):
    """The outcome of checking the shards against the lock. results/source/{model}/source.json."""

    model: str
    path: str
    revision: str
    files: dict[str, FileEntry]
    parameters: int
    tensors: int = Field(description="factors of FP8 weights not counted: they are no parameters either")
    blocks: int
    architecture: str
    dtypes: dict[str, int] = Field(description="parameters by the dtype that they are stored in")
    routed_experts: int = Field(description="experts in each MoE block, counted from tensor names; 0 for a dense model")
    shared_experts: int
    experts_per_token: int
    moe_blocks: int
    dense_blocks: int
    tensors_left_out: dict[str, str] = Field({}, description=LEFT_OUT_TEXT)
    files_left_behind: list[str] = Field(
        [], description="what else the source has, and neither is read nor goes along; folders end in /"
    )
    seconds: float = Field(description="of checking all files, one after another")


class TextSourceRecord(Record):
    name: str
    path: str
    sha256: str = Field(description="of the text file")
    share: float = Field(description="part of the samples asked for, 0 to 1")
    documents: int = Field(description="documents read")
    tokens_available: int
    samples: int
    tokens: int = Field(description="tokens used, padding not counted")
    remarks: list[str] = Field([], description="why this may be no text to use: one document, hardly any prose")


class TokenSetRecord(Record):
    samples: int
    tokens: int = Field(description="padding not counted")
    sha256: str = Field(description="of the int32 token tensor's bytes, row by row")
    sources: list[TextSourceRecord]


class CalibrationRecord(StageRecord):
    """results/calibration/{model}/{calibration}/calibration.json"""

    model: str
    calibration: str
    tokenizer_sha256: str
    seqlen: int
    pack: Literal["concat", "pad"]
    seed: int
    calibration_set: TokenSetRecord
    heldout_set: TokenSetRecord
    seconds: float


class RoutingRecord(StageRecord):
    """results/reference/{model}/{calibration}/routing_{block}.json"""

    model: str
    calibration: str
    block: int
    kind: Literal["dense", "moe"]
    tokens: int = Field(description="calibration tokens, padding not counted")
    tokens_per_expert: list[int] = Field(description="routed calibration tokens of each expert; empty if dense")
    never_reached: list[int]
    seconds: float
    peak_memory_bytes: int
    device: str = "cpu"


class KeepList(StageRecord):
    """results/{model}/prune/keep.json: the experts of a model that a pruned one has."""

    model: str = Field(description="the pruned model")
    source: str = Field(description="the model that it is made from")
    method: str
    observe: str
    calibration: str
    seed: int = Field(description="of method random")
    experts_before: int = Field(description="routed experts of each MoE block of the source")
    experts: int = Field(description="of those, kept")
    groups: int = Field(description="groups of the router; as many experts are kept in each")
    blocks: dict[int, list[int]] = Field(description="the kept experts of each MoE block, ascending")
    never_reached: dict[int, list[int]] = Field(
        description="experts of the source that no calibration token reached, by block"
    )


class BlockRecord(StageRecord):
    """results/{release}/blocks/{block}.json"""

    release: str
    block: int
    kind: Literal["dense", "moe"]
    scheme: str
    engine: str
    engine_version: str
    settings: dict[str, Any] = Field(description="every tuning setting, defaults spelled out")
    seed: int = Field(description="the seed of this block, from (release, block)")
    loss_initial: float = Field(
        description="MSE of the block's output at iteration 0, plain rounding, of its minibatch"
    )
    loss_best: float = Field(description="minibatch loss at best_iteration")
    best_iteration: int = Field(description="the one whose rounding was kept")
    iterations: int = Field(description="iterations run")
    losses: list[float] = Field(description="minibatch loss at each iteration")
    judged: dict[int, float] = Field(
        {},
        description="loss over all samples by iteration, of those that best_iteration was chosen from: plain rounding "
        "(0), the lowest minibatch's, the last; empty where it was chosen by minibatches",
    )
    quantized: dict[str, list[int]] = Field(description="quantized weights and their shapes [out, in]")
    kept: dict[str, str] = Field(description="Linears left in BF16, each with the reason")
    never_tuned: list[str] = Field(
        [], description="weights that give the block's output no gradient: quantized by plain rounding"
    )
    shared_global_scale: list[list[str]] = Field(description="groups of weights that have one global scale (NVFP4)")
    tokens_per_expert: list[int]
    never_reached: list[int] = Field(description="experts that no calibration token reached: rounded, not tuned")
    zero_inputs: list[str] = Field(
        [], description="Linears that zeros alone reached (NVFP4): they have their peers' input scale, or 1"
    )
    tokens: int
    seconds: float = Field(
        description="of tuning, encoding and the pass that feeds the next block; imports not counted"
    )
    peak_memory_bytes: int = Field(description="largest resident memory of the process")
    threads: int
    device: str
    libraries: dict[str, str] = Field(description="versions of the libraries that the bytes depend on")
    sha256: str = Field(description="of the block's file")

    @model_validator(mode="after")
    def _judged_what_is_kept(self):
        if self.judged and not {0, self.best_iteration} <= self.judged.keys():
            raise ValueError(f"judged: {sorted(self.judged)}; expected 0 and best_iteration {self.best_iteration}")
        return self

    @property
    def compared(self) -> tuple[float, float]:
        """Loss of plain rounding and of what was kept: over all samples if `judged`, else of their minibatches."""
        if self.judged:
            return self.judged[0], self.judged[self.best_iteration]
        return self.loss_initial, self.loss_best


class CopiedBlock(StageRecord):
    """results/{release}/blocks/{block}.json of a release in BF16, whose blocks are the source's."""

    release: str
    block: int
    scheme: str
    tensors: int = Field(description="by their names in the release: one for each expert and projection")
    seconds: float
    peak_memory_bytes: int = Field(description="largest resident memory of the process")
    sha256: str = Field(description="of the block's file")


class PackRecord(StageRecord):
    """results/{release}/pack.json: counted from the tensors of the packed checkpoint."""

    release: str
    model: str
    scheme: str
    files: dict[str, FileEntry]
    bytes: int = Field(description="of all shards")
    source_bytes: int = Field(description="of all shards of the source")
    parameters: int = Field(description="of the model that the checkpoint stands for")
    quantized_parameters: int
    bits_per_quantized_weight: float | None = Field(description="scales included; null if nothing is quantized")
    blocks: int
    dense_blocks: int
    moe_blocks: int
    routed_experts: int
    shared_experts: int
    experts_per_token: int
    activated_parameters: int = Field(
        description="used for one token: all but experts that are not chosen, and multi-token prediction"
    )
    multi_token_prediction: Literal["none", "kept", "dropped"] = Field(
        "none", description="the layers stored behind the blocks: kept in BF16, or left out of the release"
    )
    tensors_left_out: dict[str, str] = Field({}, description=LEFT_OUT_TEXT)
    tokenizer_from: str | None = Field(
        None, description="the file that tokenizer.json was converted from; null if the source has that itself"
    )
    hard_linked: bool = Field(description="shards share their bytes with blocks/")
    seconds: float

    @property
    def digest(self) -> str:
        """sha256 over names and hashes of the files, as sha256sum prints them: which checkpoint this is."""
        lines = "".join(f"{entry.sha256}  {name}\n" for name, entry in sorted(self.files.items()))
        return hashlib.sha256(lines.encode()).hexdigest()


OF_WHICH_FILES = "digest of the pack.json whose files this is of; null if there was none"


class TensorCheck(Record):
    block: int
    cosine: float
    relative_mae: float = Field(description="mean |error| / mean |weight|")
    sqnr_db: float | None = Field(description="10 log10(sum w^2 / sum error^2); null for an exact weight")


class VerifyRecord(StageRecord):
    """results/{release}/verify.json: the release against the source. Null are figures that need quantized weights."""

    release: str
    packed: str | None = Field(None, description=OF_WHICH_FILES)
    scheme: str
    limits: dict[str, float] = Field(
        description="of quantized weights: cosine (lowest allowed) and relative_mae (highest allowed)"
    )
    tensors: dict[str, TensorCheck] = Field(description="quantized weights, decoded and compared with the source")
    unchanged: int = Field(description="tensors that are not quantized, and equal to the source")
    unchanged_means: str = Field(description="what they were held against, and how")
    source_tensors: int = Field(description="tensors of the source, each accounted for once")
    lowest_cosine: float | None
    lowest_cosine_tensor: str | None
    highest_relative_mae: float | None
    mean_cosine: float | None
    mean_relative_mae: float | None
    mean_sqnr_db: float | None = Field(description="exact weights left out; null if there is no other")
    codes_rederived: int = Field(description="tensors whose codes came out bit for bit from decoded weights and scales")
    scale_groups: int = Field(description="fused groups whose global scales are equal")
    public_decoder: str | None
    public_decoder_tensors: int = Field(description="tensors that the public decoder decoded to the same values")
    seconds: float


class ModelQuality(Record):
    perplexity: float = Field(description="exp of the mean negative log-likelihood a token")
    kl_divergence: float = Field(description="mean KL(source || this) a token, nats; 0 for the source")
    kl_divergence_stderr: float | None = Field(
        description="samples taken as independent, tokens of one sample not; null for a single sample"
    )
    top1_agreement: float = Field(description="part of the tokens whose most likely next token is the source's")


class KlChange(Record):
    difference: float = Field(description="mean KL divergence a token, less that of the other model")
    stderr: float | None = Field(description="as of a KL divergence, sample by sample; null for a single sample")


class ReferenceText(Record):
    """The beginning of the held-out tokens, and what the release makes of it: rows of one text, nats."""

    tokens: list[list[int]]
    log_probabilities: list[list[float]] = Field(
        description="of each token of a row but the first, given those before it, as the release was evaluated"
    )
    weights_alone: list[list[float]] | None = Field(
        description="the same with activations in BF16, as an engine has them that is given decoded weights; null "
        "where the evaluation has them so"
    )


class EvaluateRecord(StageRecord):
    """results/{release}/evaluate.json: on the held-out tokens."""

    release: str
    packed: str | None = Field(None, description=OF_WHICH_FILES)
    model: str
    tokens: int = Field(description="predicted tokens")
    samples: int
    seqlen: int
    heldout_sha256: str
    activations: str = Field(description="how activations of the quantized Linears were treated")
    source: ModelQuality
    rounded: ModelQuality | None = Field(description="plain rounding, iterations 0; null if nothing is quantized")
    quantized: ModelQuality = Field(description="the release")
    kl_change: KlChange | None = Field(
        None, description="of the release against plain rounding, on the same tokens; null if nothing is quantized"
    )
    original: ModelQuality | None = Field(
        None, description="the model that `model` is pruned from, against itself; null if it is not pruned"
    )
    against_original: ModelQuality | None = Field(
        None, description="the release against that model: what pruning and quantization cost together"
    )
    block_mse: list[dict[str, float]] = Field(
        description="by block: mean squared error of the hidden states, `quantized` and, where there is one, `rounded`"
    )
    reference_text: ReferenceText
    seconds: float
    peak_memory_bytes: int
    device: str = "cpu"


class PruneEvaluateRecord(StageRecord):
    """results/{model}/prune/evaluate.json: a pruned model against the original, on the held-out tokens."""

    model: str = Field(description="the pruned model")
    source: str = Field(description="the original")
    tokens: int = Field(description="predicted tokens")
    samples: int
    seqlen: int
    heldout_sha256: str
    original: ModelQuality
    pruned: ModelQuality
    block_mse: list[float] = Field(description="by block: mean squared error of the hidden states")
    seconds: float
    peak_memory_bytes: int


class Answer(Record):
    prompt: str
    answer: str
    tokens: int = Field(description="served tokens that were replayed")
    agreeing: int = Field(description="of those, the ones that this model's own chain would choose")
    worst_gap: float = Field(description="largest log-probability gap between the chain's choice and the served token")
    source_answer_differs: bool = Field(description="the source model would have chosen another token somewhere")


class Arithmetic(Record):
    """What an engine computes a release with."""

    rounds: Literal["all", "none", "experts", "others"] = Field(
        description="quantized Linears whose inputs are rounded as the format says: those of routed experts alone, or "
        "all but those, where it is not all or none"
    )
    known_from: str = Field(description="the engine's log, or what was run")
    unlike_evaluated: str | None = Field(
        None, description="how that is another model than the one that was evaluated; null if it is the same"
    )


class Check(Record):
    """One check of the smoke test. What it found is the same whenever the same engine serves the same weights."""

    name: str
    verdict: Literal["passed", "failed", "not applicable"]
    reason: str | None = Field(None, description="why it is not applicable")
    found: str | None = None
    expected: str | None = None
    samples: int | None = Field(None, description="tokens, positions or answers that the verdict rests on")


class FailedAnswer(Record):
    prompt: str
    answer: str
    agrees: list[bool] = Field(description="of each token, whether the chain would choose it; none if not replayed")


class FailedDeployRecord(StageRecord):
    """results/{release}/deploy.failed.json: a smoke test that failed; gone once one passes."""

    release: str
    target: str
    engine: str
    engine_version: str
    command: list[str] = Field(description="as run, with the checkpoint's directory as {model}")
    environment: dict[str, str]
    arithmetic: Arithmetic | None = Field(None, description="what the engine computed with")
    engine_error: str | None = Field(None, description="how the engine ended, if it did, and its first real error")
    checks: list[Check]
    answers: list[FailedAnswer] = Field([], description="greedy ones: one at a time, all at once, to long prompts")
    verdict: Literal["failed"] = "failed"


class DeployRecord(StageRecord):
    """results/{release}/deploy.json"""

    release: str
    packed: str | None = Field(None, description=OF_WHICH_FILES)
    target: str
    engine: str
    engine_version: str
    command: list[str] = Field(description="as run, with the checkpoint's directory as {model}")
    environment: dict[str, str]
    container: dict[str, Any] | None = Field(
        None, description="what was asked of Docker, and the image's id and digests; null for a program"
    )
    weights: str = Field(description="what was served: decoded to BF16, or the packed checkpoint as it is")
    why_decoded: str | None
    arithmetic: Arithmetic | None = Field(None, description="what the engine computed with")
    startup_seconds: float
    answers: list[Answer]
    tokens: int
    agreement: float = Field(description="agreeing tokens / served tokens")
    agreement_limit: float
    agreement_least: float | None = Field(
        None, description="lowest agreement of so many tokens that chance explains, given the limit"
    )
    agreement_rule: str = Field(description="when a token counts as agreeing")
    differing: float | None = Field(
        None, description="part of the places at which other roundings of this model choose another token, at most"
    )
    control: str | None = Field(
        description="what was left out of the control's chain; null where the answers tell it from no such chain"
    )
    control_agreement: float = Field(description="the same of a chain with one block's weights left out: must be lower")
    other_model_status: int = Field(description="HTTP status for a request that names another model")
    checks: list[Check] = Field(description="all of them, in the order of docs/smoke-test.md")
    verdict: Literal["passed"]
    seconds: float


class CutAnswer(Record):
    prompt: str
    answer: str
    tokens: int = Field(description="served tokens that were replayed")
    agreeing: int = Field(description="of those, the ones that the cut's own chain would choose")
    worst_gap: float = Field(description="largest log-probability gap between the chain's choice and the served token")


class LoadTestRecord(StageRecord):
    """results/{release}/load_test.json: the first blocks of a release, served before the others were made."""

    release: str
    target: str
    blocks: int = Field(description="first blocks of the release that were served, with embeddings, norm and head")
    moe_blocks: int = Field(description="of those")
    engine: str
    engine_version: str
    command: list[str] = Field(description="as run, with the checkpoint's directory as {model}")
    environment: dict[str, str]
    container: dict[str, Any] | None = Field(
        None, description="what was asked of Docker, and the image's id and digests; null for a program"
    )
    weights: str = Field(description="what was served: decoded to BF16, or the packed blocks as they are")
    why_decoded: str | None
    arithmetic: Arithmetic | None = Field(None, description="what the engine computed with")
    startup_seconds: float
    answers: list[CutAnswer]
    tokens: int
    agreement: float = Field(description="agreeing tokens / served tokens")
    agreement_limit: float
    agreement_least: float | None = Field(
        None, description="lowest agreement of so many tokens that chance explains, given the limit"
    )
    agreement_rule: str = Field(description="when a token counts as agreeing")
    differing: float | None = Field(
        None, description="part of the places at which other roundings of the cut choose another token, at most"
    )
    control: str | None = Field(
        description="what was left out of the control's chain; null if no one block can be told from the answers"
    )
    control_agreement: float = Field(description="of that chain, or the lowest of all that were tried")
    other_model_status: int = Field(description="HTTP status for a request that names another model: refused")
    verdict: Literal["passed"]
    seconds: float


class Spread(Record):
    median: float
    lowest: float
    highest: float


class ThroughputLevel(Record):
    """So many requests at a time, again and again."""

    concurrency: int
    requests: int = Field(description="that were measured")
    prompt_tokens: Spread = Field(description="as the engine counted them")
    tokens: Spread = Field(description="written, a request")
    first_token_seconds: Spread = Field(description="from sending a request to its first text")
    decode_tokens_per_second: Spread | None = Field(
        description="of one request, behind its first text; null where no answer has a second token"
    )
    total_tokens_per_second: Spread = Field(
        description="tokens of all requests of a repeat over its time, prompts included"
    )


class ThroughputRecord(StageRecord):
    """results/{release}/throughput.json: of the engine that the smoke test passed on, asked right after it."""

    release: str
    target: str
    engine: str
    engine_version: str
    command: list[str] = Field(description="as run, with the checkpoint's directory as {model}")
    weights: str = Field(description="what was served")
    threads: int = Field(description="of the engine, on a CPU")
    machine: dict[str, Any] = Field(description="system, architecture, cpu, gpus")
    repeats: int
    warmup: int = Field(description="repeats before those, thrown away")
    max_tokens: int
    levels: list[ThroughputLevel]
    seconds: float


class Score(Record):
    task: str
    metric: str
    higher_is_better: bool
    value: float
    stderr: float | None
    samples: int


class BenchmarkRecord(StageRecord):
    """results/{release}/benchmark.json and results/reference/{model}/benchmark/{benchmark}.json"""

    subject: str = Field(description="the release or model that was measured")
    benchmark: str
    harness: str
    harness_version: str
    settings: dict[str, Any]
    arithmetic: str = Field(description="how the model was run: weights, activations, dtype")
    scores: list[Score]
    source_scores: list[Score] | None = Field(
        description="of the source model, same settings; null for the source itself"
    )
    recovery: dict[str, float | None] | None = Field(
        description="by task/metric: value over the source's value, inverted where lower is better; null if the "
        "source scores 0"
    )
    seconds: float
    peak_memory_bytes: int
    device: str = "cpu"


class ServedMeasurement(StageRecord):
    """results/{release}/served_benchmarks/{name}.measured.json, and of a source model
    results/reference/{model}/served_benchmarks/{target}/{benchmark}/{name}.json: what an engine answered, scored."""

    subject: str = Field(description="the release or model that was served")
    benchmark: str = Field(description="its section in `benchmarks`")
    name: str = Field(description="its key in `served` there")
    tasks: dict[str, str] = Field(description="lm-eval's tasks, with their versions")
    method: Literal["log-likelihood", "generation"] = Field(
        description="log-likelihood: the engine's own of each choice; generation: what it writes is read"
    )
    chat_template: bool
    num_fewshot: int
    limit: int | None = Field(description="rows of each task; null for all")
    seed: int = Field(description="of the first repeat; the engine is given one more in each")
    repeats: int
    temperature: float
    max_tokens: int | None = Field(description="null for the task's own")
    harness: str
    harness_version: str
    data: str = Field(description="where the rows come from")
    documents_sha256: str = Field(description="over the rows, in order")
    prompts: int = Field(description="requests of one repeat")
    prompts_sha256: str = Field(description="over the prompts as sent, in order, with the choices that are scored")
    scores: list[Score]
    samples: FileEntry = Field(description="the file beside this one that has each row's scores and answers")
    target: str
    engine: str
    engine_version: str
    command: list[str] = Field(description="as run, with the checkpoint's directory as {model}")
    environment: dict[str, str]
    weights: str = Field(description="what was served: decoded to BF16, or the checkpoint as it is")
    why_decoded: str | None
    arithmetic: Arithmetic | None = Field(None, description="what the engine computed with; null for a source model")
    sandbox: dict[str, Any] | None = Field(description="where the model's code ran; null if none was run")
    sentences: str | None = Field(description="what splits text into sentences; null if nothing does")
    kept_answers: int = Field(description="of the requests, those that an earlier run of this job had an answer to")
    seconds: float = Field(description="of this run")


class PairedTest(Record):
    """Whether the release and the source differ on the rows that both were asked."""

    test: str
    rows: int
    better: int = Field(description="rows that the release does better on than the source")
    worse: int
    p_value: float = Field(description="two-sided")


class ServedBenchmarkRecord(StageRecord):
    """results/{release}/served_benchmarks/{name}.json: a served release's score, and what it is held against."""

    release: str
    measured: ServedMeasurement
    metric: str = Field(description="the score that is the benchmark's")
    score: float
    stderr: float | None
    higher_is_better: bool
    expected: tuple[float, float] | None = Field(description="lowest and highest score that is no surprise")
    verdict: Literal["inside", "below", "above"] | None = Field(description="of the score; null without a range")
    source_kind: Literal["measured", "cited"] | None
    source_model: str = Field(description="the checkpoint that the release was made from, before any pruning")
    source_score: float | None
    source_stderr: float | None
    citation: str | None = Field(description="where a cited score is published")
    source_scores: list[Score] | None = Field(description="measured through the same target; null if not measured")
    recovery: float | None = Field(description="score / source's score, inverted where lower is better; 1 is all of it")
    recovery_interval: tuple[float, float] | None = Field(description="95 %")
    interval_method: str | None
    paired: dict[str, PairedTest] = Field(description="by metric; empty unless both were asked the same")
    unpaired_because: str | None


class SchemePlan(Record):
    """A release of one scheme, predicted."""

    tensor_bytes: int = Field(description="of the values of all tensors; exact")
    file_bytes: int = Field(description="of all shards, headers included; exact")
    quantized_parameters: int
    bits_per_quantized_weight: float | None = Field(description="scales included; null if nothing is quantized")
    kept: dict[str, int] = Field(description="Linears left in BF16 by the reason, counted")


class DiskPlan(Record):
    """Bytes on disk at the peak, which comes when the release is served."""

    source: int = Field(description="of the checkpoint's shards")
    tokens: int
    reference: int = Field(
        description="hidden states of the model, shared with its other releases, and of the one it is pruned from"
    )
    chain: int = Field(description="hidden states of the release")
    shards: int = Field(description="of the release; blocks and model share them by hard links")
    served: int = Field(description="BF16 copy that the deploy stage makes where the engine can't read the format")
    load_test: int = Field(
        0, description="embeddings, norm and head that the load test stores, and its BF16 copy where there is one"
    )
    peak: int = Field(description="of all these, with the larger of `served` and `load_test`")
    free: int = Field(description="on the disk of the working directory when the plan was made")


class TargetPlan(Record):
    """Whether a release fits its target."""

    target: str
    engine: str
    device: str
    gpu: str | None
    devices: int
    image: str | None = Field(description="container image of the engine; null for a program")
    memory_bytes: int | None = Field(description="of a device; null if the config doesn't say")
    problem: str | None = Field(description="why the engine refuses the release; null if it serves it")
    weights_bytes: int = Field(description="on each device, as the engine holds them")
    weights: str = Field(description="how the engine holds them")
    arithmetic: str | None = Field(None, description="what the engine computes with; null where it refuses the release")
    cache_bytes_per_token: int = Field(description="KV cache of a token on each device")
    cached_tokens: int | None = Field(description="tokens whose KV cache fits; null if the memory is not known")
    concurrency: int
    context: int | None = Field(description="tokens that each of `concurrency` requests can have")
    context_wanted: int
    fits: bool | None = Field(description="null if the memory is not known")
    shortage: str | None = Field(description="what has no room, and what would fit; null if all has, or if not known")


class StagePlan(Record):
    stage: str = Field(description="the rule; `observe`: the rule `reference` for the model that is pruned")
    jobs: int
    seconds: float | None = Field(description="of all its jobs, one after another; null if not known")
    basis: str = Field(description="what the seconds follow from")


class TimelinePlan(Record):
    """A simulated build up to its last block, with what comes after that is known."""

    devices: int
    inputs: Literal["quantized", "reference"] = Field(description="what blocks are tuned on")
    seconds: float = Field(description="until the last block is made")
    busy: float = Field(description="share of the devices' time until then in which they are taken")
    states_bytes: int = Field(description="hidden states at a time, at most, each deleted behind its last reader")


class PlanRecord(Record):
    """results/{release}/plan.json: what a build of the release will take, predicted before anything runs."""

    release: str
    model: str
    scheme: str
    basis: Literal["lock", "headers", "config"] = Field(description="what tensors are known from")
    parameters: int = Field(description="of the model")
    activated_parameters: int = Field(
        description="used for one token: not experts left out, not multi-token prediction"
    )
    drafting_parameters: int = Field(description="of those, multi-token prediction")
    drafting_if_stored: int = Field(
        description="parameters of multi-token prediction that config.json names, where a config alone can't "
        "tell whether the checkpoint stores them; they are in no other figure"
    )
    blocks: int
    moe_blocks: int
    routed_experts: int
    experts_per_token: int
    source_bytes: int = Field(description="of the source's shards; without headers if known from config.json alone")
    download_bytes: int = Field(description="of the source that is not here")
    schemes: dict[str, SchemePlan]
    disk: DiskPlan
    cpu_bytes: dict[str, int] = Field(description="largest resident memory of a job, by rule")
    gpu_bytes: int | None = Field(description="of the tuning job; null if it runs on the CPU")
    jobs: dict[str, int] = Field(description="by rule, of a build of this release alone from nothing")
    source_files_known: bool = Field(description="false: one more job for each file of the source")
    target: TargetPlan
    stages: list[StagePlan]
    timelines: list[TimelinePlan] = Field(
        description="simulated on equal devices; none if seconds of a block are not known, or nothing is quantized"
    )
    pruned_from: str | None = Field(None, description="the model whose files are read; null if it is not pruned")
    experts_before: int | None = Field(None, description="routed experts of its MoE blocks")


class PublishRecord(StageRecord):
    """results/{release}/publish.json: what was uploaded, and is there as it is here."""

    release: str
    endpoint: str = Field(description="address of the hub")
    repository: str
    branch: str
    commit: str = Field(description="the one that has these files and no others")
    private: bool
    files: dict[str, FileEntry] = Field(description="of the release, as the hub gave them back")
    bytes: int = Field(description="of all of them")
    published: str = Field(description="when the hub was seen to have them, UTC, ISO 8601")
    seconds: float


R = TypeVar("R", bound=Record)

DIGEST = "xxh3_64"  # the key of a record's digest in its file


def write_json(path: str | Path, record: Record) -> None:
    """Writes `record` whole: to a temporary name beside `path`, then renamed. That of a stage gets its digest."""
    data = record.model_dump(mode="json")
    if isinstance(record, StageRecord):
        data[DIGEST] = _digest(data)
    write_text(path, json.dumps(data, indent=1, sort_keys=True) + "\n")


def _digest(data: dict[str, Any]) -> str:
    import xxhash

    return xxhash.xxh3_64_hexdigest(json.dumps(data, sort_keys=True).encode())


def write_text(path: str | Path, text: str) -> None:
    """Writes UTF-8 `text` whole: to a temporary name beside `path`, then renamed."""
    with written_whole(path) as partial:
        partial.write_text(text, encoding="utf-8")


def packed_as(folder: Path) -> str | None:
    """Which checkpoint is in `folder`: the digest of the pack.json beside it; None if there is none."""
    manifest = folder.parent / "pack.json"
    return read_json(manifest, PackRecord).digest if manifest.exists() else None


def read_keep(paths: Sequence[str | Path]) -> KeepList | None:
    """The keep list of a pruned model, of `paths` one file; None, of no file, for a model that is not pruned."""
    return read_json(paths[0], KeepList) if paths else None


def read_json(path: str | Path, kind: type[R], remedy: str = "delete it to rebuild") -> R:
    """Reads the record of `kind` in `path`.

    RequantError if it is absent, or, with a `remedy`, of another shape or not as its stage wrote it.
    """
    with open_file(path, f"a {kind.__name__} written by its stage") as file:
        data = file.read()
    try:
        found = json_object(data, path, f"a {kind.__name__}; {remedy}")
        if issubclass(kind, StageRecord):
            data = _held(found, data, path, remedy)
        return kind.model_validate_json(data)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        key = plain(".".join(str(part) for part in first["loc"]), 80) or "the file"
        raise RequantError(f"{path}: {key}: {plain(first['msg'])}; expected a {kind.__name__}; {remedy}") from None


def _held(found: dict, data: bytes, path: str | Path, remedy: str) -> bytes:
    """The record of a stage without its digest. RequantError if it has one and that is not of this record."""
    if DIGEST not in found:
        return data
    if (kept := found.pop(DIGEST)) != (digest := _digest(found)):
        raise RequantError(f"{path}: changed since it was written: {DIGEST} {digest} found, {kept} expected; {remedy}")
    return json.dumps(found).encode()

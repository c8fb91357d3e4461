"""The configuration: names, defaults and limits of every key, closed to unknown ones.

`parse` turns the merged YAML into a `Config` or raises one `RequantError` whose lines each name a key, the value
found and what is allowed. The defaults are the settings of the public releases: 200 iterations, 512 samples of
2048 tokens, seed 42.
"""

import math
import re
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, ValidationError, model_validator

from requant.engine_arguments import problem_in, wrong_variable
from requant.errors import RequantError, brief, plain
from requant.schemes import SCHEMES

COMPUTES = False  # the schema of the config: its values reach a job as params


# Folders of results/ that belong to no release.
RESERVED = ("benchmarks", "calibration", "card", "demo", "reference", "source")
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
SERVED_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,99}")  # no dot: files beside a record have one
REPOSITORY = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*/[A-Za-z0-9][A-Za-z0-9._-]*")
# A bucket, and a prefix of keys without empty parts.
ADDRESS = re.compile(r"s3://(?P<bucket>[a-z0-9][a-z0-9.-]{1,61}[a-z0-9])(?:/(?P<prefix>[^/\s]+(?:/[^/\s]+)*))?/?")

MOST_LINES = 20  # of the errors of one config
FROM_THE_BEGINNING = "re:"  # what marks a pattern of `keep` that has to match from the beginning of a name on

PositiveInt = Annotated[int, Field(ge=1, strict=True)]
Seed = Annotated[int, Field(ge=0, lt=2**32, strict=True)]


class Section(BaseModel):
    """A part of the config: unknown keys are errors and values never change after parsing."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


METHODS = ("reap", "frequency", "random")


class Prune(Section):
    """Which routed experts of a model are left out: as many in each MoE block, and in each of its router's groups."""

    method: Literal[METHODS] = Field(
        "reap",
        description="reap: those of the lowest saliency (arXiv 2510.13999); frequency: those chosen least; random",
    )
    ratio: float | None = Field(
        None, gt=0, lt=1, description="part of the experts that is dropped, rounded to whole experts a group"
    )
    experts: PositiveInt | None = Field(None, description="experts of a block that are kept, in place of `ratio`")
    calibration: str = Field("default", description="tokens that experts are observed on: a name in `calibrations`")
    observe: Literal["oneshot", "sequential"] = Field(
        "oneshot",
        description="oneshot: all blocks of the original model; sequential: each block on the output of the pruned "
        "blocks before it",
    )
    seed: Seed = Field(42, description="of method random")
    compare: list[Literal[METHODS]] = Field(
        [],
        description="other methods to hold it against, at the same number of experts: each makes a model of its own, "
        "{name}.{method}",
    )

    @model_validator(mode="after")
    def _one_number(self):
        if (self.ratio is None) == (self.experts is None):
            found = "both" if self.experts else "neither"
            raise ValueError(f"ratio, experts: {found} found; expected one: `ratio: 0.25`, or `experts: 192`")
        for method in self.compare:
            if method == self.method or self.compare.count(method) > 1:
                raise ValueError(f"compare: {method!r}; expected methods other than `method`, each once")
        return self


class Model(Section):
    """A model: a directory (`path`), a repository of the hub (`hub`) at one commit, with its lock, files in a bucket
    (`bucket`), with their lock, or another model with fewer experts (`from` and `prune`)."""

    path: str | None = Field(None, min_length=1, description="directory of the checkpoint")
    hub: str | None = Field(None, description="repository on the Hugging Face hub (org/name), in place of `path`")
    bucket: str | None = Field(
        None, description="address of its files in S3-compatible storage (s3://BUCKET/PREFIX), in place of `path`"
    )
    revision: str | None = Field(
        None, description="commit of `hub`, 40 hex digits; for a branch, a tag or none, `lock` says which commit it is"
    )
    directory: str | None = Field(
        None,
        min_length=1,
        description="where the files of `hub` or `bucket` go; if absent, huggingface_hub's cache, or "
        "results/source/{model}/bucket",
    )
    source_model: str | None = Field(
        None, alias="from", description="model that is pruned: another name in `models`, with `path`, `hub` or `bucket`"
    )
    prune: Prune | None = Field(None, description="which experts of `from` are left out")
    base_model: str | None = Field(
        None,
        description="hub name of the model, for the card's metadata (org/name); `hub`, or that of `from`, if absent",
    )
    license: str | None = Field(
        None,
        description="licence of the weights, as the hub names it (mit, apache-2.0, other); that of `from` if absent",
    )

    @model_validator(mode="before")
    @classmethod
    def _base_is_the_repository(cls, data: Any):
        return {"base_model": data["hub"], **data} if isinstance(data, dict) and data.get("hub") else data

    @model_validator(mode="after")
    def _one_source(self):
        given = {"path": self.path, "hub": self.hub, "bucket": self.bucket, "from": self.source_model}
        found = [key for key, value in given.items() if value]
        if len(found) != 1:
            raise ValueError(
                f"path, hub, bucket, from: {', '.join(found) or 'none'} found; expected one: `path: DIRECTORY`, "
                "`hub: ORG/NAME`, `bucket: s3://BUCKET/PREFIX`, or `from: MODEL` with `prune`"
            )
        if (self.source_model is None) != (self.prune is None):
            raise ValueError(f"{'from' if self.prune is None else 'prune'}: found alone; expected `from` and `prune`")
        if self.hub and not REPOSITORY.fullmatch(self.hub):
            raise ValueError(f"hub: {self.hub!r}; expected a repository of the hub, ORG/NAME")
        if self.bucket and not ADDRESS.fullmatch(self.bucket):
            raise ValueError(f"bucket: {self.bucket!r}; expected an address, s3://BUCKET/PREFIX")
        if not self.hub and self.revision:
            raise ValueError(f"revision: {self.revision!r}; expected with `hub` only, not with `{found[0]}`")
        if not (self.hub or self.bucket) and self.directory:
            raise ValueError(
                f"directory: {self.directory!r}; expected with `hub` or `bucket` only, not with `{found[0]}`"
            )
        return self


class TextSource(Section):
    """One source of calibration text: plain text (documents parted by blank lines) or JSON lines."""

    path: str = Field(
        min_length=1,
        description="file of plain text or JSON lines in UTF-8; results/demo/... is generated by the graph",
    )
    name: str | None = Field(None, description="name in records and on the card; the file's stem if absent")
    share: float = Field(1.0, gt=0, description="part of the samples, relative to the other sources")
    field: str = Field("text", description="key of the text in a JSON line")


CALIBRATION_TEXT = (
    TextSource(name="stories", path="results/demo/calibration/stories.jsonl", share=0.5),
    TextSource(name="exercises", path="results/demo/calibration/exercises.jsonl", share=0.5),
)


class HeldOut(Section):
    """Tokens that no block is tuned on: KL divergence, agreement and perplexity are measured on them."""

    nsamples: PositiveInt = Field(64, description="samples of seqlen tokens")
    sources: list[TextSource] | None = Field(
        None, description="text of its own; if absent, one document in ten of the calibration text is set aside"
    )


class Calibration(Section):
    """A token set: texts, their shares, and how they are packed."""

    sources: list[TextSource] = Field(
        list(CALIBRATION_TEXT), min_length=1, description="the texts; by default those of the embedded model"
    )
    nsamples: PositiveInt = Field(512, description="samples for tuning")
    seqlen: Annotated[int, Field(ge=2, le=1_048_576, strict=True)] = Field(2048, description="tokens a sample")
    pack: Literal["concat", "pad"] = Field(
        "concat", description="concat: documents joined, cut every seqlen tokens; pad: one document a sample"
    )
    seed: Seed = Field(42, description="decides which documents, and their order")
    heldout: HeldOut = HeldOut()

    @model_validator(mode="after")
    def _unique_names(self):
        for where, sources in (("sources", self.sources), ("heldout.sources", self.heldout.sources or [])):
            names = [source_name(source) for source in sources]
            twice = sorted({name for name in names if names.count(name) > 1})
            if twice:
                raise ValueError(f"{where}: two sources are called {twice[0]!r}; give one of them another `name`")
        return self


class Tuning(Section):
    """How the rounding of a block is tuned (SignRound, arXiv 2309.05516)."""

    engine: Literal["fused", "auto_round"] = Field(
        "fused", description="what tunes: requant's own SignRound, or AutoRound, which it is measured against"
    )
    iters: Annotated[int, Field(ge=0, le=50_000, strict=True)] = Field(200, description="0 is plain rounding")
    batch_size: PositiveInt = Field(8, description="samples a step")
    gradient_accumulate_steps: PositiveInt = Field(1, description="batches added up for one step")
    lr: float | None = Field(None, gt=0, description="step of the rounding offsets; 1/iters if absent")
    minmax_lr: float | None = Field(None, gt=0, description="step of the group scales; lr if absent")
    minmax: bool = Field(True, description="tune the group scales too")
    momentum: float = Field(0.0, ge=0, lt=1, description="of the optimizer")
    inputs: Literal["quantized", "reference"] = Field(
        "quantized",
        description="quantized: a block sees what the quantized blocks before it give, and waits for them; reference: "
        "what the source's give, so that blocks are tuned side by side",
    )
    segment: PositiveInt | None = Field(
        None, description="with inputs: quantized, blocks of a chain, whose first sees the source's; all if absent"
    )
    best_mse: bool = Field(True, description="keep the parameters of the lowest loss, not the last ones")
    judge: Literal["samples", "minibatch"] | None = Field(
        None,
        description="what best_mse goes by. minibatch, as AutoRound: the lowest loss of any one minibatch. samples "
        "(the default of fused): of those parameters, the last ones and plain rounding, whichever have the lowest loss "
        "over all samples",
    )
    seed: Seed = Field(42, description="with release and block it gives each block's seed")
    threads: PositiveInt = Field(1, description="CPU threads of a tuning job; a part of what the bytes depend on")
    device: str = Field(
        "cpu", pattern=r"^(cpu|cuda(:\d+)?|xpu(:\d+)?)$", description="cpu, cuda or xpu; that of the config if absent"
    )

    @property
    def judges_by_samples(self) -> bool:
        """Whether the parameters to keep are chosen over all samples."""
        return self.best_mse and (self.judge or ("samples" if self.engine == "fused" else "minibatch")) == "samples"

    @model_validator(mode="after")
    def _chains_have_pieces(self):
        if self.segment is not None and self.inputs == "reference":
            raise ValueError(f"segment: {self.segment}: inputs: reference has no chains; expected inputs: quantized")
        return self

    @model_validator(mode="after")
    def _engine_can(self):
        if self.engine == "auto_round" and self.judge == "samples":
            raise ValueError("judge: 'samples': engine auto_round goes by minibatches; expected minibatch, or fused")
        if self.engine == "fused":
            for key, unable in (("momentum", self.momentum > 0), ("device", self.device.startswith("xpu"))):
                if unable:
                    raise ValueError(
                        f"{key}: {getattr(self, key)!r}: engine fused has none; expected another, or engine: auto_round"
                    )
        return self


class Verify(Section):
    """Limits that every quantized tensor has to keep against the source."""

    cosine: float | None = Field(None, ge=0, le=1, description="lowest cosine similarity; by scheme if absent")
    relative_mae: float | None = Field(
        None, gt=0, description="highest mean |error| / mean |weight|; by scheme if absent"
    )
    public_decoder_samples: PositiveInt = Field(16, description="tensors also decoded by compressed-tensors")


VERIFY_DEFAULTS = {  # (cosine, relative MAE) that round-to-nearest keeps on Gaussian weights, with room for tuning
    "NVFP4": (0.985, 0.14),
    "W3A16": (0.93, 0.36),
    "W4A16": (0.98, 0.18),
    "W8A16": (0.9995, 0.02),
}


class Throughput(Section):
    """How the served model's speed is measured."""

    concurrency: list[PositiveInt] = Field(
        [1, 4, 16], min_length=1, description="requests at a time, each measured by itself"
    )
    prompt_tokens: PositiveInt = Field(64, description="tokens of a prompt, at most: held-out texts may be shorter")
    max_tokens: Annotated[int, Field(ge=2, strict=True)] = Field(32, description="tokens asked for")
    repeats: PositiveInt = Field(3, description="how often each is measured")
    warmup: Annotated[int, Field(ge=0, strict=True)] = Field(1, description="repeats before those, thrown away")


class Deploy(Section):
    """The smoke test of the served model."""

    target: str = Field("cpu-transformers", description="where to serve: a name in `targets`")
    prompts: PositiveInt = Field(8, description="held-out texts whose continuation is asked for")
    prompt_tokens: PositiveInt = Field(32, description="tokens of each prompt")
    max_tokens: PositiveInt = Field(16, description="tokens asked for")
    agreement: float = Field(
        0.95, gt=0, le=1, description="part of the served tokens that this model itself would choose"
    )
    load_test_blocks: Annotated[int, Field(ge=0, strict=True)] | None = Field(
        None,
        description="first blocks that are served as soon as they are made, 0 for none; as many as have one MoE block, "
        "of a dense model one, if absent; none where that is all blocks of the model",
    )
    reference_tokens: Annotated[int, Field(ge=2, strict=True)] = Field(
        2048, description="held-out tokens whose log-probabilities are compared"
    )
    vocabulary_tokens: PositiveInt = Field(
        1024, description="tokens of the vocabulary that the engine is shown where it can't be asked for its tokenizer"
    )
    rounding: float = Field(
        1.25,
        ge=1,
        description="how far the engine's log-probabilities may be from this model's own, as a multiple of how far "
        "apart two right roundings of it are",
    )
    long_prompt_tokens: PositiveInt = Field(
        1024, description="tokens of a long prompt, at most; fewer if the model's context is shorter"
    )
    throughput: Throughput = Throughput()


class Reproduce(Section):
    """How far a rebuilt weight may be from the published one where its bytes are not the same (`requant reproduce`).

    On the same kind of machine nothing differs. The limits are for another kind: tuning makes a different last bit of
    a matrix product into different choices between neighbouring codes.
    """

    min_cosine: float | None = Field(
        None, ge=0, le=1, description="lowest cosine of the two decoded weights; that of `verify` by scheme if absent"
    )
    max_code_fraction: float | None = Field(
        None, ge=0, le=1, description="part of a weight's codes that may differ; 0.5, of 8-bit codes 1, if absent"
    )
    max_relative_error: float | None = Field(
        None,
        ge=0,
        description="norm of the difference over that of the published weight, and of the range of its inputs; what "
        "`min_cosine` allows for equal norms if absent",
    )


class Release(Section):
    """A checkpoint to be made: what from, in which format, how, and with which checks."""

    model: str = Field(description="what from: a name in `models`")
    scheme: Literal[tuple(SCHEMES)] = Field(
        description="number format; BF16 quantizes nothing: `tuning`, `keep` and `verify` are of no effect"
    )
    calibration: str = Field("default", description="tokens to tune on: a name in `calibrations`")
    tuning: Tuning = Tuning()
    keep: list[str] = Field(
        [],
        description="Linears that stay in BF16, with what engines fuse with them: regular expressions, found "
        "anywhere in names as transformers has them; after `re:`, as llm-compressor writes them, from the beginning "
        "on. What the engine of deploy.target can't load packed stays besides (docs/targets.md)",
    )
    mtp: Literal["keep", "drop"] = Field(
        "keep",
        description="layers for multi-token prediction: keep them in BF16, or leave them out; a pruned model has none",
    )
    verify: Verify = Verify()
    deploy: Deploy = Deploy()
    benchmark: str = Field("default", description="what to measure: a name in `benchmarks`")
    reproduce: Reproduce = Reproduce()

    @property
    def chained(self) -> bool:
        """Whether a block is tuned on what the quantized blocks before it give, and so waits for them."""
        return SCHEMES[self.scheme].quantizes and self.tuning.inputs == "quantized"

    @property
    def made_by(self) -> str:
        """The rule that makes its blocks."""
        return ("quantize" if self.chained else "quantize_apart") if SCHEMES[self.scheme].quantizes else "copy_block"

    @model_validator(mode="after")
    def _patterns_compile(self):
        for pattern in self.keep:
            try:
                re.compile(pattern.removeprefix(FROM_THE_BEGINNING))
            except (re.error, OverflowError, RecursionError) as error:
                raise ValueError(f"keep: {brief(pattern)} is not a regular expression ({error})") from error
        return self


class HubTask(Section):
    """A benchmark of the hub that an lm-eval task is: what its scores are filed under in .eval_results."""

    dataset: str = Field(pattern=f"^{REPOSITORY.pattern}$", description="data set on the hub that has the benchmark")
    task: str = Field(min_length=1, description="name of the task in that data set's eval.yaml")
    metric: str = Field(min_length=1, description="the score to give, as lm-eval calls it: exact_match, acc, ...")
    revision: str | None = Field(None, pattern="^[0-9a-f]{40}$", description="commit of the data set")


# Benchmarks that `served` knows by name: their lm-eval tasks, conventions and data are in requant.served_tasks.
PUBLIC = ("mmlu", "gsm8k", "math", "humaneval", "ifeval")


class Cited(Section):
    """A score of the source model that somebody published."""

    value: float = Field(description="the score, on the scale of lm-eval: 0 to 1 for parts that are right")
    citation: str = Field(min_length=1, description="where it is published")


# Which of the two is meant is told by the shape, so that an error speaks of one of them.
SourceScore = Annotated[
    Annotated[Literal["measured"], Tag("measured")] | Annotated[Cited, Tag("cited")],
    Discriminator(lambda found: "cited" if isinstance(found, dict | Cited) else "measured"),
]


class Served(Section):
    """One benchmark of a release as its target serves it, and of the source model as the same target serves that."""

    task: str | None = Field(
        None, min_length=1, description=f"name of an lm-eval task; known for {', '.join(PUBLIC)}, needed for others"
    )
    metric: str | None = Field(
        None,
        min_length=1,
        description="the score that is the benchmark's, as its record calls it: `exact_match (strict-match)`; the "
        "convention's if absent, of another task its first",
    )
    num_fewshot: Annotated[int, Field(ge=0, strict=True)] | None = Field(
        None, description="examples before each question; the convention's number, or the task's own, if absent"
    )
    limit: PositiveInt | None = Field(
        None, description="only the first rows of each task (of mmlu: of each subject): for trials, not for a card"
    )
    seed: Seed = Field(42, description="of lm-eval's choices, and of the engine's sampling")
    repeats: PositiveInt = Field(1, description="runs over all rows; each has a seed of its own: seed, seed + 1, ...")
    temperature: float = Field(0.0, ge=0, description="0: the most likely token each time")
    max_tokens: PositiveInt | None = Field(None, description="tokens of an answer at most; the task's own if absent")
    chat: bool | None = Field(
        None, description="whether questions go through the chat template; the convention's (ifeval: yes) if absent"
    )
    data: str | None = Field(
        None,
        min_length=1,
        description="directory with the benchmark's published files; from the hub, or the task's own, if absent",
    )
    expected: tuple[float, float] | None = Field(
        None, description="lowest and highest score that is no surprise: shown beside the score, and said if missed"
    )
    source: SourceScore | None = Field(
        "measured",
        description="the source model's score: `measured` through the same target, or `value` and `citation` of a "
        "published one; null: none",
    )

    @model_validator(mode="after")
    def _range_is_ordered(self):
        if self.expected is not None and self.expected[0] > self.expected[1]:
            raise ValueError(f"expected: {list(self.expected)}; expected the lower score first")
        return self


class Benchmark(Section):
    """lm-eval tasks, run on the source model and on each release."""

    tasks: list[str] = Field(
        ["requant_exercises", "requant_stories"], min_length=1, description="names of lm-eval tasks"
    )
    include_path: str | None = Field("demo/tasks", description="directory with further lm-eval task files")
    num_fewshot: Annotated[int, Field(ge=0, strict=True)] | None = Field(
        None, description="examples before each question; the task's own number if absent"
    )
    limit: PositiveInt | None = Field(None, description="only the first rows of each task: for trials, not for a card")
    batch_size: PositiveInt = Field(16, description="rows run together")
    seed: Seed = Field(42, description="of lm-eval's choices")
    hub: dict[str, HubTask] = Field(
        {}, description="those tasks that are benchmarks of the hub, by name: for .eval_results of a release"
    )
    served: dict[str, Served] = Field(
        {}, description=f"benchmarks of the served model, by name: {', '.join(PUBLIC)}, or one of your own with `task`"
    )

    @model_validator(mode="after")
    def _served_are_known(self):
        for name, entry in self.served.items():
            if not SERVED_NAME.fullmatch(name):
                raise ValueError(f"served.{plain(name, 80)}: names have letters, digits, '_' and '-' only, 100 at most")
            if name in PUBLIC and entry.task is not None:
                raise ValueError(f"served.{name}.task: {entry.task!r}; expected none: {name} has its own")
            if name not in PUBLIC and entry.task is None:
                raise ValueError(
                    f"served.{name}.task: missing; expected an lm-eval task, or one of {', '.join(PUBLIC)}"
                )
            if name == "humaneval" and entry.chat:
                raise ValueError("served.humaneval.chat: True; expected false: the model goes on with a program")
            if name not in PUBLIC and entry.data is not None:
                raise ValueError(f"served.{name}.data: {entry.data!r}; expected none: the task's file names its data")
            if name in PUBLIC and entry.expected is not None and not 0 <= entry.expected[0] <= entry.expected[1] <= 1:
                raise ValueError(f"served.{name}.expected: {list(entry.expected)}; expected parts of 1: [0.73, 0.79]")
        return self


class Mount(Section):
    """A directory of this machine that a container sees."""

    source: str = Field(min_length=1, description="directory of this machine")
    target: str = Field(pattern="^/", description="where the container has it")
    read_only: bool = Field(True, description="whether the container may not write there")


class Container(Section):
    """How an engine's container is run. Nothing is granted that is not named here."""

    pull: Literal["missing", "never"] = Field(
        "missing", description="missing: the image is pulled where Docker has it not; never: that is an error"
    )
    network: Literal["bridge", "host"] = Field(
        "bridge", description="bridge: one port, published on the loopback alone; host: the engine binds the loopback"
    )
    ipc: Literal["private", "host"] = Field("private", description="whose shared memory it uses")
    shm_size: str | None = Field(None, pattern=r"^\d+[kmg]$", description="size of its /dev/shm: 8g")
    ulimits: dict[str, int] = Field({}, description="limits of its processes by name, -1 for none: memlock, stack")
    memory_gb: float | None = Field(None, gt=0, description="main memory at most, 10^9 bytes; no limit if absent")
    cpus: float | None = Field(None, gt=0, description="processors at most; no limit if absent")
    processes: PositiveInt = Field(16384, description="processes and threads at most")
    capabilities: list[str] = Field([], description="Linux capabilities that it keeps; all others are dropped")
    user: str | None = Field(None, min_length=1, description="UID or UID:GID it runs as; the image's own if absent")
    mounts: list[Mount] = Field([], description="directories that it sees besides the checkpoint")


class Limit(Section):
    """Something that a target can't run."""

    what: str = Field(min_length=1, description="what it can't run")
    why: str = Field(min_length=1, description="the reason")


# How long an engine on a GPU may take to answer unless its target says: kernels are compiled at a first start (sglang's
# for minutes), a cold disk gives some hundred MB a second, and vLLM took 81 to 185 s for a tiny model on an H200.
GPU_STARTUP_SECONDS = 3600

# Names of variables that hold credentials, and of those that only look so.
CREDENTIAL = re.compile(r"TOKEN|API_?KEY|ACCESS_KEY|SECRET|PASSWORD|PASSWD|CREDENTIAL|PRIVATE_KEY|NETRC", re.IGNORECASE)
NO_CREDENTIALS = ("TOKENIZERS_PARALLELISM",)


def is_credential(variable: str) -> bool:
    """Whether an environment variable of that name holds what no engine needs to see: it reads local files only."""
    return variable not in NO_CREDENTIALS and CREDENTIAL.search(variable) is not None


class Target(Section):
    """A place to serve a release at: which engine, in which image, with which arguments, on what.

    Those of config/targets/ in requant's checkout are there without being named here (docs/targets.md has them). An
    entry may start from one of them, or from another entry, by `like: NAME`: what it says itself replaces what that
    one says, and mappings (`container`, `environment`) are merged.
    """

    description: str | None = Field(None, min_length=1, description="what it is, in a sentence, for people")
    engine: Literal["transformers", "vllm", "sglang"] = Field("transformers", description="the server")
    image: str | None = Field(
        None,
        min_length=1,
        description="container image that has the engine, with tag or digest; the engine of this environment if absent",
    )
    container: Container = Container()
    arguments: list[str] = Field(
        [],
        description="of the engine, after those that follow from other keys: those that docs/targets.md lists",
    )
    environment: dict[str, str] = Field(
        {}, description="variables that the engine is started with: docs/targets.md lists them"
    )
    device: Literal["cpu", "cuda"] = Field("cpu", description="what the engine runs on")
    gpu: str | None = Field(None, pattern=r"^sm\d{2,3}$", description="architecture of the GPUs: sm90, sm100, sm120")
    devices: PositiveInt = Field(1, description="GPUs that share the weights")
    memory_gb: float | None = Field(None, gt=0, description="memory of a device, 10^9 bytes")
    memory_fraction: float = Field(0.85, gt=0, le=1, description="part of it for weights and KV cache")
    kv_cache: Literal["bf16", "fp8_e4m3"] | None = Field(
        None, description="format of the KV cache; what the engine chooses, which is planned as BF16, if absent"
    )
    quantization: Literal["compressed-tensors", "modelopt_fp4"] | None = Field(
        None, description="quantization that checkpoints have to have; any, each by its own name, if absent"
    )
    concurrency: PositiveInt = Field(1, description="requests at a time")
    context: PositiveInt | None = Field(None, description="tokens a request should have; the model's own if absent")
    weights: Literal["auto", "decoded"] = Field(
        "auto", description="auto: the packed checkpoint where the engine reads its format; decoded: BF16 weights"
    )
    startup_seconds: PositiveInt = Field(
        180,
        description="how long the engine may take to answer its health check; 3600 if absent with `device: cuda`: a "
        "first start reads the weights from disk and compiles kernels",
    )
    request_seconds: PositiveInt = Field(120, description="how long one answer may take")
    limits: list[Limit] = Field([], description="what it can't run, and why, for people")
    tested: str | None = Field(None, min_length=1, description="what of it was run, for people")

    @model_validator(mode="before")
    @classmethod
    def _patient_on_gpus(cls, data: Any) -> Any:
        if isinstance(data, dict) and data.get("device") == "cuda":
            return {"startup_seconds": GPU_STARTUP_SECONDS, **data}
        return data

    @model_validator(mode="after")
    def _engine_is_told_what_it_may(self):
        if (problem := problem_in(self.engine, self.arguments)) is not None:
            raise ValueError(f"arguments: {problem}")
        for name, value in self.environment.items():
            if is_credential(name):
                raise ValueError(
                    f"environment: {plain(name, 80)}: a credential by its name; expected none: what a target says is "
                    "recorded and published, and an engine reads local files only"
                )
            if (problem := wrong_variable(self.engine, name, value)) is not None:
                raise ValueError(f"environment: {plain(name, 80)}: {problem}")
        return self

    @model_validator(mode="after")
    def _engine_has_its_gpu(self):
        if self.engine != "transformers" and self.device == "cpu":
            raise ValueError(f"device: 'cpu': engine {self.engine} is planned for on GPUs only; expected cuda")
        if self.engine != "transformers" and self.gpu is None:
            raise ValueError(
                f"gpu: missing: which formats {self.engine} serves depends on it; expected sm90, sm120, ..."
            )
        if self.device == "cpu" and (self.gpu is not None or self.devices > 1):
            raise ValueError("device: 'cpu': `gpu` and `devices` describe GPUs; expected cuda")
        return self


class Sandbox(Section):
    """Where code that a model wrote runs, and what it may take: a program with its tests is one process or a few."""

    backend: Literal["auto", "docker", "bubblewrap"] = Field(
        "auto", description="auto: Docker if an engine answers, else bubblewrap; without either nothing runs"
    )
    image: str | None = Field(
        None,
        min_length=1,
        description="container image with `python3`, for Docker: python:3.11-slim, best by digest; this machine's "
        "Python in an empty image if absent",
    )
    memory_mb: Annotated[int, Field(ge=64, le=1_048_576, strict=True)] = Field(
        1024, description="memory of a program, 2^20 bytes"
    )
    seconds: float = Field(10.0, gt=0, le=3600, description="time of a program")
    processes: Annotated[int, Field(ge=1, le=1024, strict=True)] = Field(
        8, description="processes and threads of a program"
    )


class Publish(Section):
    """What is done to a finished release."""

    signing_key: str | None = Field(
        None,
        min_length=1,
        description="EC private key in PEM that each release is signed by, readable by you alone; unsigned if absent",
    )
    repositories: dict[str, str] = Field(
        {}, description="where `snakemake publish` uploads a release to, by its name: ORG/NAME on the hub"
    )
    private: bool = Field(True, description="whether only you and your organisation see those repositories")
    branch: str = Field(
        "main", pattern=r"^[A-Za-z0-9][A-Za-z0-9._/-]{0,99}$", description="branch of the repositories to commit to"
    )

    @model_validator(mode="after")
    def _repositories_can_be(self):
        for release, name in self.repositories.items():
            if (
                not REPOSITORY.fullmatch(name)
                or len(name.split("/")[1]) > 96
                or re.search(r"--|\.\.|[-.](/|$)|\.git$", name)
            ):
                raise ValueError(
                    f"repositories.{plain(release, 80)}: {brief(name)}; expected ORG/NAME of the hub: letters, digits, "
                    "'-', '_' and '.', NAME of 96 at most, no '--' or '..', no '-' or '.' at an end, no '.git'"
                )
        twice = sorted(
            {name for name in self.repositories.values() if list(self.repositories.values()).count(name) > 1}
        )
        if twice:
            raise ValueError(f"repositories: {twice[0]!r} is given for two releases; expected one for each")
        return self


class Config(Section):
    """The whole configuration."""

    models: dict[str, Model]
    calibrations: dict[str, Calibration] = {}
    benchmarks: dict[str, Benchmark] = {}
    targets: dict[str, Target] = {}
    releases: dict[str, Release]
    publish: Publish = Publish()
    sandbox: Sandbox = Sandbox()
    build: list[str] = Field(min_length=1, description="The releases that `model_card.md` covers, in its order.")
    keep_hidden_states: bool = Field(
        True,
        description="false: a file of hidden states goes when the last job that reads it is done; a later change "
        "goes through the chain again",
    )
    device: str = Field(
        "cpu",
        pattern=r"^(cpu|cuda(:\d+)?)$",
        description="what models run on, cpu or cuda: the reference chain, tuning, evaluation and benchmarks",
    )

    @model_validator(mode="before")
    @classmethod
    def _add_defaults(cls, data: Any):
        if not isinstance(data, dict):
            return data
        data = dict(data)
        for section, name in (("calibrations", "default"), ("benchmarks", "default"), ("targets", "cpu-transformers")):
            entries = data.get(section) or {}
            if isinstance(entries, dict):
                data[section] = {name: {}, **entries}
        if "device" in data and isinstance(data.get("releases"), dict):
            data["releases"] = {name: _on_device(entry, data["device"]) for name, entry in data["releases"].items()}
        return data

    @model_validator(mode="after")
    def _pruned_models(self):
        """Gives pruned models what they take over, and adds those that `compare` implies."""
        for name, model in list(self.models.items()):
            source = self.models.get(model.source_model or "")
            if source is None:
                continue
            known = {"base_model": source.base_model, "license": source.license}
            given = {key: getattr(model, key) for key in known if getattr(model, key) is not None}
            self.models[name] = model.model_copy(update=known | given)
            for method in model.prune.compare:
                if f"{name}.{method}" in self.models:
                    raise ValueError(
                        f"models.{name}.{method}: found; models.{name}.prune.compare makes a model so named"
                    )
                prune = model.prune.model_copy(update={"method": method, "compare": []})
                self.models[f"{name}.{method}"] = self.models[name].model_copy(update={"prune": prune})
        return self

    @model_validator(mode="after")
    def _names_resolve(self):
        problems = []
        for section in ("models", "calibrations", "benchmarks", "targets", "releases"):
            for name in getattr(self, section):
                if not NAME.fullmatch(name):
                    problems.append(
                        f"{section}.{plain(name, 80)}: names have letters, digits, '.', '_' and '-' only, 100 at most"
                    )
        for name in self.releases:
            if name in RESERVED:
                problems.append(f"releases.{name}: results/{name}/ is the graph's own; expected another name")
        problems += [problem for name, model in self.models.items() if model.prune for problem in self._pruned(name)]
        known = {section: getattr(self, f"{section}s") for section in ("model", "calibration", "benchmark", "target")}
        for name, release in self.releases.items():
            asked = {
                "model": release.model,
                "calibration": release.calibration,
                "benchmark": release.benchmark,
                "deploy.target": release.deploy.target,
            }
            for key, value in asked.items():
                names = known[key.split(".")[-1]]
                if value not in names:
                    section = key.split(".")[-1] + "s"
                    problems.append(
                        f"releases.{name}.{key}: {value!r} is not in `{section}`; there: {', '.join(sorted(names))}"
                    )
            if "mtp" in release.model_fields_set and release.mtp == "keep" and self._is_pruned(release.model):
                problems.append(
                    f"releases.{name}.mtp: 'keep'; expected 'drop' for the pruned model {release.model!r}: experts of "
                    "multi-token prediction are not observed"
                )
        for name in self.publish.repositories:
            if name not in self.releases:
                problems.append(
                    f"publish.repositories.{plain(name, 80)}: not in `releases`; there: "
                    f"{', '.join(sorted(self.releases))}"
                )
        for name in self.build:
            if name not in self.releases:
                problems.append(f"build: {name!r} is not in `releases`; there: {', '.join(sorted(self.releases))}")
        twice = sorted({name for name in self.build if self.build.count(name) > 1})
        problems += [f"build: {name!r} is listed twice" for name in twice]
        if problems:
            raise ValueError("\n".join(problems))
        return self

    def _is_pruned(self, model: str) -> bool:
        return model in self.models and self.models[model].prune is not None

    def _pruned(self, name: str) -> list[str]:
        """What is wrong with the names that a pruned model gives."""
        model, sources = self.models[name], [other for other in self.models if not self._is_pruned(other)]
        problems = []
        if name in RESERVED:
            problems.append(f"models.{name}: results/{name}/ is the graph's own; expected another name")
        if model.source_model not in sources:
            found = "is itself pruned" if self._is_pruned(model.source_model) else "is not in `models`"
            problems.append(
                f"models.{name}.from: {model.source_model!r} {found}; there, with `path` or `hub`: "
                f"{', '.join(sorted(sources)) or 'none'}"
            )
        if model.prune.calibration not in self.calibrations:
            problems.append(
                f"models.{name}.prune.calibration: {model.prune.calibration!r} is not in `calibrations`; there: "
                f"{', '.join(sorted(self.calibrations))}"
            )
        return problems


def _on_device(release: Any, device: Any) -> Any:
    """The release with its tuning on `device`, unless it says otherwise or is no mapping."""
    if not isinstance(release, dict) or not isinstance(release.get("tuning") or {}, dict):
        return release
    return release | {"tuning": {"device": device} | (release.get("tuning") or {})}


def source_name(source: TextSource) -> str:
    """The name a text source goes by: its own, else its file's stem."""
    return source.name or source.path.rsplit("/", 1)[-1].split(".", 1)[0]


def verify_limits(release: Release) -> tuple[float, float] | None:
    """(lowest cosine, highest relative MAE) for a release: its own limits, else those of its scheme.

    None for BF16: its tensors have to be the source's, bit for bit.
    """
    if not SCHEMES[release.scheme].quantizes:
        return None
    cosine, relative_mae = VERIFY_DEFAULTS[release.scheme]
    return (
        cosine if release.verify.cosine is None else release.verify.cosine,
        relative_mae if release.verify.relative_mae is None else release.verify.relative_mae,
    )


def reproduce_limits(limits: Reproduce, scheme: str) -> Reproduce:
    """`limits` with those of `scheme` where they are absent; for BF16, of which nothing may differ, the strictest."""
    usual = VERIFY_DEFAULTS[scheme][0] if scheme in VERIFY_DEFAULTS else 1.0
    cosine = usual if limits.min_cosine is None else limits.min_cosine
    most = {4: 0.5, 3: 0.5, 8: 1.0, 16: 0.0}[SCHEMES[scheme].weight_bits]
    given = limits.model_dump(exclude_none=True)
    between = math.sqrt(2 * (1 - cosine))  # of two vectors of one length
    return Reproduce(**{"min_cosine": cosine, "max_code_fraction": most, "max_relative_error": between} | given)


def parse(data: dict) -> Config:
    """Checks the merged YAML `data`.

    Raises RequantError with one line for each problem: `config: KEY: FOUND; expected: WHAT IS ALLOWED`.
    """
    try:
        return Config.model_validate(data)
    except ValidationError as error:
        lines = [plain(line, 600) for problem in error.errors(include_url=False) for line in _lines(problem)]
        more = [f"and {len(lines) - MOST_LINES} more like these"] if len(lines) > MOST_LINES else []
        raise RequantError("\n".join(f"config: {line}" for line in [*lines[:MOST_LINES], *more])) from None


def parse_target(data: dict, where: str) -> Target:
    """Checks one target by itself. Raises RequantError with a line for each problem, beginning with `where`."""
    try:
        return Target.model_validate(data)
    except ValidationError as error:
        lines = [plain(line, 600) for problem in error.errors(include_url=False) for line in _lines(problem, Target)]
        raise RequantError("\n".join(f"{where}: {line}" for line in lines[:MOST_LINES])) from None


def _lines(problem: dict, root: type[BaseModel] | None = None) -> list[str]:
    """The lines of one problem; `root`: the section that its keys begin in, the whole config if absent."""
    key = plain(".".join(map(str, problem["loc"])), 120)
    found = brief(problem.get("input"))
    context = problem.get("ctx", {})
    kind = problem["type"]
    if kind == "value_error":
        text = str(context["error"])
        return [f"{key}.{line}" if key else line for line in text.split("\n")]
    if kind == "extra_forbidden":
        return [f"{key}: unknown key (value {found}); expected: one of {', '.join(_known_keys(problem['loc'], root))}"]
    if kind == "missing":
        return [f"{key}: missing; expected: {_describe(problem['loc'], root)}"]
    if kind == "literal_error":
        return [f"{key}: {found}; expected: {context['expected']}"]
    return [f"{key or 'the whole'}: {found}; expected: {plain(problem['msg'].removeprefix('Input should be '))}"]


def _section_at(location: tuple, root: type[BaseModel] | None) -> type[BaseModel]:
    """The section class that holds the key at `location`."""
    section: Any = root or Config
    for part in location[:-1]:
        if (field := _fields(section).get(part)) is not None:
            section = _inner_section(field.annotation) or section
    return section


def _fields(section: type[BaseModel]) -> dict[str, Any]:
    """The fields of a section by the keys that a config has for them."""
    return {field.alias or name: field for name, field in section.model_fields.items()}


def _inner_section(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    for argument in getattr(annotation, "__args__", ()):
        if inner := _inner_section(argument):
            return inner
    return None


def _known_keys(location: tuple, root: type[BaseModel] | None) -> list[str]:
    return sorted(_fields(_section_at(location, root)))


def _describe(location: tuple, root: type[BaseModel] | None) -> str:
    field = _fields(_section_at(location, root)).get(str(location[-1]))
    return (field.description if field is not None else None) or "a value"

"""docs/targets.md and docs/targets/*.md, written from config/targets/: `python -m requant.targets_reference docs`."""

import json
import re
import sys
from collections.abc import Iterable
from pathlib import Path

from requant.arithmetic import FACTS, Fact, in_words, planned
from requant.config import Target
from requant.container import container_request
from requant.engine_arguments import FAMILIES, FAMILIES_OF, FLAGS, NO_SWITCHES, VARIABLES, VARIABLES_OF
from requant.engine_command import docker_command, engine_command, is_pinned, shell
from requant.engine_keeps import KEEPS
from requant.engine_runs import Run, runs
from requant.reproduce import checkout
from requant.schemes import SCHEMES
from requant.target_files import FOLDER, read_targets, target_named
from requant.targets import holds_packed, unsupported

ANY_FAMILY = ""  # none that was run: what is said of an engine in general
OF = {None: "", True: " with experts", False: " without experts"}
CHECKPOINT, NAME, PORT = "/data/my-release", "my-release", 8000  # of the commands shown

INDEX = """\
# Targets

Written from `config/targets/` by `python -m requant.targets_reference docs`.

A target says where a release is served: by which engine, in which container image, with which arguments and
variables, on which GPUs. One file describes it, `config/targets/NAME.yaml`; `docs/config.md` has every key. Whatever
starts an engine reads it: the deploy stage, its smoke test, `requant serve`, and the command on the card.

{table}

A release names its target: `deploy: {{target: sm120-sglang}}`. A config has targets of its own, which may start from
one of these. What they say themselves replaces what that one says; `container` and `environment` are merged:

    targets:
      four: {{like: sm120-sglang, devices: 4, context: 65536}}

A file in `config/targets/` is a target for every config. `provenance.json` of a release has the whole of its target,
so that a rebuild needs none of these files.

## What is checked before hours are spent

Planning, `snakemake -n` too, ends with one line if

- the engine can't serve the release's scheme on these GPUs, or its `quantization` is another;
- the engine of the image is too old for the family of the model. The version is read from the image's tag. Only
  DeepSeek-V3 and V3.2, which engines came to know late, are checked;
- weights and KV cache at the `context` and `concurrency` that are wanted don't fit `devices` x `memory_gb` x
  `memory_fraction`. The line has the numbers, and what would fit. `docs/plan.md` says how they are counted.

A build that serves ends with one line too if no Docker engine or no GPU is on this machine; a dry run warns, and a
cluster's head node is not asked. Everything that comes before the card can be built without them:
`snakemake --cores all results/NAME/verify.json results/NAME/evaluate.json results/NAME/benchmark.json`.

## What engines compute with

NVFP4 rounds activations to 4 bits too, for which GPUs have products from sm100 on. An engine on an older one refuses
the format, or has the weights alone in it and leaves activations in BF16. That is a right model, but another one than
the one that was evaluated: the smoke test holds it against requant's own chain without rounded activations, and
`deploy.json` and the card say so.

{facts}

What an engine's own log says of its kernels is believed before this table.

## What engines were seen to serve

Random models of each family, of widths that kernels for GPUs take, as `benchmarks/engines.py` makes and serves them by
the engine as a program: plain rounding, all that the engine needs in BF16 kept so, and the checks of the smoke test.
Planning goes by this table first: a family in a format that its engine refused, or answered wrongly, is refused with
the engine's words. A number says how far log-probabilities were off, in times of what rounding explains; 1.25 is
allowed. What has no cell was not run, and goes by the table above. A table of releases with all Linears packed shows
what an engine can't do and requant gets around, by keeping Linears in BF16 or decoding weights: planning does not go by
it.

{runs}

## What engines take in BF16

Some code of engines asks a Linear for its `weight`, which a packed one has not. A release whose `deploy.target` has
such an engine keeps these in BF16, as by `keep`, with what is fused with them. Planning says so, sizes are those of
such a release, and its records, card and provenance have the reason. A release for several engines names the target
that needs most.

{keeps}

## Serving by hand

    requant serve results/demo-w3a16/model --target cpu-transformers
    requant serve results/my-release/model --target sm120-sglang --dry-run

The first serves on the loopback until Ctrl-C. The second starts nothing: it shows what Docker would be asked for and
the same as a `docker run`, with `--json` for programs. Both check format, family and size of the checkpoint first.
`deploy.md` says what a container is given and how it ends.

## Arguments and variables

An engine is told what follows from the other keys of its target, then `arguments`, and gets the variables of
`environment`. Both are of these lists alone: what names code, a file, a folder, an address or another model is not
there, nor what makes another model of the checkpoint that was checked. Anything else ends planning in one line. Flags
are written out whole, with `=` or the value after them.

{flags}

Variables are switches and numbers (`1`, `0.5`, `true`, `False`) of these families, but for those that a part of their
name gives away ({closed}):

{families}

and these: {variables}; of vLLM: {of_vllm}; of sglang: {of_sglang}. `PATH` says where a program without an `image` is
looked for.

A program gets besides, of the variables of whoever starts it, where programs and libraries are (`PATH`,
`LD_LIBRARY_PATH`, `PYTHONPATH`, `VIRTUAL_ENV`), where it may write (`HOME`, `TMPDIR`, caches), the locale, and what is
set for this machine's GPUs and threads (`CUDA_*`, `NVIDIA_*`, `NCCL_*`, `OMP_*` and their like). No other: no
credential, no proxy, no `LD_PRELOAD`. A container gets none of them.

## Images

{pinning}

An image is named by its digest (`image: name@sha256:...`) or by a tag, which its owner may move. Those here have tags:
no digest was looked up. To pin yours, take what `docker image inspect --format '{{{{index .RepoDigests 0}}}}' IMAGE`
prints. The deploy stage records the digest of the image that it served by.
"""

CPU_IMAGE = """\
## The image

You make it, or name your own in `image`: one that has `transformers serve` and `python3`. From requant's locks:

    docker build --file envs/engine.Dockerfile --tag requant-engine:cpu envs

[Serving a release](../deploy.md) says how containers are run.
"""


def index(targets: dict[str, Target]) -> str:
    """docs/targets.md."""
    rows = [
        f"| [{name}](targets/{name}.md) | {target.description} | {served_schemes(target)} |"
        for name, target in targets.items()
    ]
    table = "\n".join(["| target | what it is | serves |", "|---|---|---|", *rows])
    images = sorted({target.image for target in targets.values() if target.image and not is_pinned(target.image)})
    pinning = "\n".join(f"- `{image}`" for image in images)
    return INDEX.format(
        table=table,
        facts=_facts(),
        keeps=_keeps(),
        runs=_runs(),
        pinning=pinning,
        flags="\n\n".join(f"**{engine}**\n\n{_flags(engine)}" for engine in FLAGS),
        closed=", ".join(f"`{part}`" for part in re.findall(r"[A-Z]+(?:_[A-Z]+)*", NO_SWITCHES.pattern)),
        families=", ".join(f"`{family}_*`" for family in FAMILIES)
        + "".join(f"; of {engine}: {_names(f'{one}_*' for one in own)}" for engine, own in FAMILIES_OF.items() if own),
        variables=_names([*VARIABLES, "LC_*"]),
        of_vllm=_names(VARIABLES_OF["vllm"]),
        of_sglang=_names(VARIABLES_OF["sglang"]),
    )


def _flags(engine: str) -> str:
    """A table of the engine's flags by what they take."""
    takes = list(dict.fromkeys(value.says for value in FLAGS[engine].values()))
    rows = [f"| {says} | {_names(f for f, value in FLAGS[engine].items() if value.says == says)} |" for says in takes]
    return "\n".join(["| takes | flags |", "|---|---|", *rows])


def _names(names: Iterable[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)


def served_schemes(target: Target) -> str:
    """What the engine serves of families that were not run: all of it, or of models without routed experts alone."""
    found = {name: _refusals(name, target) for name in SCHEMES}
    served = [name for name, (moe, dense) in found.items() if moe is None and dense is None]
    dense_alone = [name for name, (moe, dense) in found.items() if moe is not None and dense is None]
    return ", ".join([*served, *(f"{name} without experts" for name in dense_alone)])


def _refusals(name: str, target: Target) -> tuple[str | None, str | None]:
    """Why a scheme's mixtures of experts are refused, and why other models are."""
    moe, dense = (unsupported(SCHEMES[name], target, ANY_FAMILY, experts) for experts in (True, False))
    return moe, dense


def page(name: str, target: Target) -> str:
    """docs/targets/{name}.md."""
    gpus = f"{target.devices} x {target.gpu}" if target.device == "cuda" else "CPU"
    said = target.description[0].upper() + target.description[1:]
    parts = [
        f"# {name}\n\n{said}.\n\nWritten from `{FOLDER}/{name}.yaml` by `python -m requant.targets_reference docs`.\n",
        f"| | |\n|---|---|\n| engine | {target.engine} |\n| image | {_image(target)} |\n| runs on | {gpus} |\n"
        f"| memory | {_memory(target)} |\n| requests at a time | {target.concurrency} |\n"
        f"| tokens a request | {target.context or 'the context of the model'} |\n"
        f"| waits for it to start | {target.startup_seconds} s at most |\n",
        "## What it serves\n\n| scheme | |\n|---|---|\n"
        + "\n".join(f"| {scheme} | {_verdict(scheme, target)} |" for scheme in SCHEMES)
        + "\n",
        "## What it can't run\n\n| what | why |\n|---|---|\n"
        + "\n".join(f"| {limit.what} | {limit.why} |" for limit in target.limits)
        + "\n",
        _command(target),
        *([CPU_IMAGE] if target.image and target.device == "cpu" else []),
        f"## What was run\n\n{target.tested}\n",
    ]
    return "\n".join(parts)


def _image(target: Target) -> str:
    if target.image is None:
        return "none: a program of this environment"
    return f"`{target.image}`" + ("" if is_pinned(target.image) else ", a tag: see [Images](../targets.md#images)")


def _memory(target: Target) -> str:
    if target.memory_gb is None:
        return "not planned: the target doesn't say how much there is"
    room = target.memory_gb * target.memory_fraction
    cache = f"a KV cache in {target.kv_cache}" if target.kv_cache else "a KV cache"
    held = "packed weights, shared out evenly," if holds_packed(target) else "BF16 weights, shared out evenly,"
    return (
        f"{target.devices} x {target.memory_gb:g} GB, of which {target.memory_fraction:g}, {room:g} GB each, for "
        f"{held} and {cache}"
    )


def _verdict(name: str, target: Target) -> str:
    moe, dense = _refusals(name, target)
    if moe is not None:
        return f"no: {moe}" if dense is not None else f"models without routed experts; of others: {moe}"
    if SCHEMES[name].quantizes and not holds_packed(target):
        return "decoded to BF16 first" if SCHEMES[name].is_nvfp4 else "unpacked to BF16 by transformers"
    if SCHEMES[name].quantizes_activations:
        return f"yes: {in_words(planned(SCHEMES[name], target, decoded=False))}"
    return "yes"


def _facts() -> str:
    """The table of what engines compute with."""
    said = {it: f": `{it.said}`" if it.said else "" for it in FACTS}
    rows = [
        f"| {it.engine} {it.version} | {it.scheme}{OF[it.experts]} | {_gpus(it)} | {it.does} | {it.basis}{said[it]} |"
        for it in FACTS
    ]
    return "\n".join(["| engine | scheme | GPUs | | rests on |", "|---|---|---|---|---|", *rows])


def _runs() -> str:
    """A table for each engine: a line a family, a column a scheme; what went wrong is below it."""
    return "\n\n".join(
        _runs_of(title, [run for run in runs() if (run.where, run.packed) == (title, packed)], packed)
        for title, packed in dict.fromkeys((run.where, run.packed) for run in runs())
    )


def _runs_of(title: str, found: list[Run], packed: str) -> str:
    told = list(dict.fromkeys(run.told for run in found if run.told))
    cells = {(run.case, run.scheme): _run(run, told) for run in found}
    rows = [
        f"| {case} | " + " | ".join(cells.get((case, scheme), "") for scheme in SCHEMES) + " |"
        for case in dict.fromkeys(run.case for run in found)
    ]
    notes = [f"{number}. `{_cell(text)}`" for number, text in enumerate(told, 1)]
    head = f"**{title}**" + (", all Linears packed" if packed == "all" else "")
    table = "\n".join([f"| | {' | '.join(SCHEMES)} |", "|---" * (len(SCHEMES) + 1) + "|", *rows])
    return "\n\n".join([head, table, *(["\n".join(notes)] if notes else [])])


def _run(run: Run, told: list[str]) -> str:
    """A cell: how far off, or the number of what was told."""
    if run.outcome == "served":
        return f"yes, {run.off}" if run.off else "yes"
    number = f" ({told.index(run.told) + 1})"
    return ("refused" if run.outcome == "refused" else f"wrong, {run.off}" if run.off else "wrong") + number


def _keeps() -> str:
    """The table of what stays in BF16 for engines."""
    rows = [f"| {it.engine} | {_names(it.families)} | `{_cell(it.pattern)}` | {it.basis} |" for it in KEEPS]
    return "\n".join(["| engine | families | Linears | rests on |", "|---|---|---|---|", *rows])


def _cell(text: str) -> str:
    """`text` in a cell of a table: no bar ends it."""
    return text.replace("|", "\\|")


def _gpus(fact: Fact) -> str:
    if fact.last is None:
        return f"sm{fact.first} and later" if fact.first else "all"
    return f"sm{fact.first} to sm{fact.last}" if fact.first else f"before sm{fact.last + 1}"


def _command(target: Target) -> str:
    """The section with the command for a checkpoint in CHECKPOINT, and what Docker is asked for."""
    quantization = "compressed-tensors" if holds_packed(target) else None
    if target.image is None:
        command = engine_command(target, CHECKPOINT, NAME, PORT)
        return f"## Command\n\n    {_indented(shell(command))}\n"
    request = container_request(target, Path(CHECKPOINT), NAME, PORT, quantization=quantization)
    return (
        f"## Command\n\nFor a release in `{CHECKPOINT}`, as `requant serve --dry-run` shows it:\n\n"
        f"    {_indented(shell(docker_command(request)))}\n\n"
        "requant asks Docker for the same through its Python SDK, waits for the health check, and removes the "
        f"container in the end:\n\n    {_indented(json.dumps(request, indent=2))}\n"
    )


def _indented(text: str) -> str:
    return text.replace("\n", "\n    ")


def pages() -> dict[str, str]:
    """Every page by its path in docs/."""
    folder = checkout() / FOLDER
    targets = {name: target_named(name, None, folder) for name in read_targets(folder)}
    return {"targets.md": index(targets)} | {f"targets/{name}.md": page(name, found) for name, found in targets.items()}


if __name__ == "__main__":
    docs = Path(sys.argv[1])
    (docs / "targets").mkdir(exist_ok=True)
    for path, text in pages().items():
        (docs / path).write_text(text, encoding="utf-8")

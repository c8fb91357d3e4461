"""
What the rules share: the parsed config, and input and parameter functions named for what they mean.
"""

import os
import re
import sys
from contextlib import ExitStack
from functools import cache
from pathlib import Path
from types import SimpleNamespace

from snakemake.io import IOFile
from snakemake_interface_executor_plugins.settings import SharedFSUsage

LIBRARY = Path(workflow.basedir) / "src"
sys.path.insert(0, str(LIBRARY))
inherited = dict(os.environ).get("PYTHONPATH", "")
os.environ |= {
    "PYTHONPATH": f"{LIBRARY}{os.pathsep}{inherited}".rstrip(os.pathsep)
}  # jobs import requant too
# Snakemake walks chains recursively: 61 blocks and two releases exceed Python's default.
sys.setrecursionlimit(20_000)

from requant.architecture import block_count, block_of, expert_counts
from requant.benchmark import task_inputs
from requant.buildlock import alone, drop_stale_locks
from requant.carried import TEMPLATES, TOKENIZER_FILES, carried
from requant.checkpoint import INDEX, Checkpoint
from requant.clock import check_times
from requant.config import PUBLIC, parse as parse_config, verify_limits
from requant.cut import blocks_to_load, check_load_test
from requant.disk import (
    chain_files,
    check_room,
    check_writable,
    files_to_come,
    heldout_beside,
    reference_files,
)
from requant.download import check_download_room, remote_model
from requant.duration import read_rates
from requant.engine_keeps import for_engine
from requant.errors import RequantError
from requant.fp8 import without_scales
from requant.gate import open_again
from requant.hashing import file_entry
from requant.imports import code_of, libraries_of
from requant.jobs import announce_build, spare_collector
from requant.locks import load_lock, tensors_of
from requant.naming import entries, places
from requant.needs import (
    DOWNLOAD_RATE,
    PLAIN,
    Need,
    file_need,
    memory_mb,
    model_needs,
    release_needs,
    run_minutes,
    served_need,
    text_need,
)
from requant.planning import (
    check_bucket_model,
    check_chat_template,
    check_hub_model,
    check_locked_shards,
    check_locked_source,
    check_path,
    check_persistence,
    check_source_names,
    check_storage,
    file_rates,
    made_here,
    model_to_lock,
    remarks_on,
    text_files,
)
from requant.preflight import (
    check_activation,
    check_context,
    check_files,
    check_group,
    check_linears,
    check_model,
    check_source,
)
from requant.provenance import check_config
from requant.publishing import releases_asked, upload_asked
from requant.pruning import check_counts, kept_experts
from requant.published import files as published_files
from requant.sandbox import which_sandbox
from requant.schemes import SCHEMES
from requant.shapes import linear_widths, shapes_of
from requant.served_tasks import asks_by_chat
from requant.signature import check_key
from requant.sizes import Shaped
from requant.standalone import standalone
from requant.target_files import FOLDER, with_targets
from requant.task_names import check_tasks
from requant.targets import (
    check_family,
    check_here,
    check_memory,
    check_scheme,
    wanted_context,
    weight_bytes,
)
from requant.unchanged import check_release, gone, is_as_checked, is_as_packed, is_as_read
from requant.view import group_count, pruned_config, routed_experts


wildcard_constraints:
    model=r"[A-Za-z0-9][A-Za-z0-9._-]*",
    release=r"[A-Za-z0-9][A-Za-z0-9._-]*",
    calibration=r"[A-Za-z0-9][A-Za-z0-9._-]*",
    benchmark=r"[A-Za-z0-9][A-Za-z0-9._-]*",
    target=r"[A-Za-z0-9][A-Za-z0-9._-]*",
    task=r"[A-Za-z0-9][A-Za-z0-9_-]*",
    block=r"\d+",
    file=rf"({TEMPLATES}/)?[^/]+",


def or_stop(function, *arguments):
    """The function's value; a RequantError ends the planning with its one line (one for each problem of the config).

    An exception that Snakemake catches would be printed with frames of this file, and would be passed over in an
    input function whose outputs are there.
    """
    try:
        return function(*arguments)
    except RequantError as error:
        sys.exit("\n".join(f"error: {line}" for line in str(error).splitlines()))


def or_warn(function, *arguments):
    """As `or_stop` for a build that would start on a machine without room; a dry run says so and goes on."""
    if not workflow.is_main_process:
        return
    if not workflow.output_settings.dryrun:
        or_stop(function, *arguments)
        return
    try:
        function(*arguments)
    except RequantError as error:
        print(f"warning: {error}", file=sys.stderr)


def say_once(lines):
    """Tells who plans a build what is no error; the jobs of a build, which plan it again, don't."""
    if workflow.is_main_process:
        for line in lines:
            print(f"note: {line}", file=sys.stderr)


# `--config model=NAME` belongs to the rule `lock`; `release=NAME` and `upload=true` to `publish`; rates to `plan`.
ASKED = ("model", "release", "upload", "disk", "shared", "hub")
GIVEN = {key: value for key, value in config.items() if key not in ASKED}
CONFIG = or_stop(parse_config, or_stop(with_targets, GIVEN, Path(workflow.basedir) / FOLDER))

or_stop(
    check_storage,
    workflow.storage_settings.default_storage_provider,
    SharedFSUsage.INPUT_OUTPUT in workflow.storage_settings.shared_fs_usage,
)

or_stop(check_path, workflow.basedir, "requant's checkout")
or_stop(check_persistence, str(workflow.workflow_settings.persistence_backend))
announce_build()
spare_collector()


def only_looks(mode):
    """Whether Snakemake will change nothing here: in a dry run, or to plan, which has no outputs."""
    if mode == "execute" and set(workflow.dag_settings.targets) == {"plan"}:
        return True
    return mode in ("execute", "delete_output") and workflow.output_settings.dryrun


def in_turn(mode):
    """The workflow's method of that name, while no other build lives in this directory; beside one that only looks."""
    run = getattr(workflow, mode)

    def begin(*given, **settings):
        if only_looks(mode):
            if (other := drop_stale_locks(os.getcwd())) is not None:
                print(f"another build is running here ({other})", file=sys.stderr)
            if mode == "execute":
                # Snakemake would remove the other build's locks with its own.
                workflow.execution_settings.lock = False
            return run(*given, **settings)
        or_stop(check_writable, ".", "results", "logs", ".snakemake")
        with ExitStack() as held:
            or_stop(held.enter_context, alone(os.getcwd(), mode == "unlock"))
            if mode == "execute":
                open_again(Path("results"))
            return run(*given, **settings)

    return begin


# This file is read whatever Snakemake was asked for; what that is shows when it calls one of these.
if workflow.is_main_process:
    for mode in ("execute", "unlock", "cleanup_metadata", "cleanup_shadow", "delete_output", "containerize"):
        setattr(workflow, mode, in_turn(mode))


# Where things are


def located(path):
    """A path of the config: relative to the working directory, else to the directory of the Snakefile.

    What the graph makes is always in the working directory.
    """
    beside = Path(workflow.basedir) / path
    return str(beside) if not made_here(path) and not Path(path).exists() and beside.exists() else path


def source_name(model):
    """The model whose files a model is read from: itself, or the one that it is pruned from."""
    return CONFIG.models[model].source_model or model


def is_remote(model):
    """Whether a model's files come from the hub or a bucket."""
    source = CONFIG.models[source_name(model)]
    return source.hub is not None or source.bucket is not None


def source_dir(model):
    """Where a checkpoint is read; for a remote model a folder of links to its files, made by `download`."""
    source = source_name(model)
    if is_remote(model):
        return f"results/source/{source}/checkpoint"
    return located(os.path.expanduser(CONFIG.models[source].path).rstrip("/"))


def own_texts():
    """The files of calibration texts."""
    sets = [
        found for calibration in CONFIG.calibrations.values() for found in (calibration, calibration.heldout)
    ]
    return [located(source.path) for found in sets for source in found.sources or []]


or_warn(
    check_times,
    ["results", *(source_dir(model) for model in CONFIG.models if not is_remote(model)), *own_texts()],
)


def lock_file(model):
    """The model's lock, or None if it has none. The checkout's locks pin its own local checkpoints only."""
    here = Path("locks") / f"{source_name(model)}.json"
    beside = Path(workflow.basedir) / here
    own = is_remote(model) or Path(workflow.basedir).resolve() in Path(source_dir(model)).resolve().parents
    return next((str(path) for path in (here, beside) if path.exists() and (path == here or own)), None)


@cache
def lock_at(path):
    return or_stop(load_lock, path)


@cache
def remote_lock(model):
    """The lock of a remote model. Stops the planning if there is none, or if it is of another commit."""
    lock, source = lock_at(lock_file(model)) if lock_file(model) else None, source_name(model)
    if CONFIG.models[source].bucket:
        or_stop(check_bucket_model, source, lock)
    else:
        or_stop(check_hub_model, source, CONFIG.models[source].revision, lock)
    return lock


@cache
def checkpoint_plan(model):
    """(config.json, shard of each tensor, files to check) of a model: from its lock, else from its headers.

    A pruned model has the tensors and files of its source, and its own config.json.
    """
    if (prune := CONFIG.models[model].prune) is not None:
        source_config, shard_of, files = checkpoint_plan(source_name(model))
        kept = or_stop(kept_experts, model, prune, source_config)
        or_stop(check_counts, model, or_stop(places, shard_of, source_config), source_config)
        return pruned_config(source_config, kept), shard_of, files
    path = lock_file(model)
    if is_remote(model) or path is not None:
        lock = remote_lock(model) if is_remote(model) else lock_at(path)
        if model != config.get("model"):  # a lock that is made anew may be of other files
            if not is_remote(model):
                or_stop(check_locked_source, model, source_dir(model), path, sorted(lock.files))
                look_beside(or_stop(Checkpoint, source_dir(model)), lock.files)
            or_stop(check_model, path, lock.config, lock.tensors)
        or_stop(check_source_names, model, source_dir(model), sorted(lock.files))
        return lock.config, {name: entry.shard for name, entry in lock.tensors.items()}, sorted(lock.files)
    or_stop(check_path, source_dir(model), f"models.{model}.path")
    local = or_stop(Checkpoint, source_dir(model))
    tensors = or_stop(tensors_of, source_dir(model))
    or_stop(check_model, source_dir(model), local.config, tensors)
    look_beside(local, local.files)
    or_stop(check_source_names, model, source_dir(model), local.files)
    return local.config, {name: entry.shard for name, entry in tensors.items()}, local.files


def look_beside(local, used):
    """Stops the planning if a file beside a model's weights can't be taken along; warns of weights that are not read.

    used: the files that a build uses, by a lock or by what is there.
    """
    or_stop(check_files, local)
    or_stop(check_locked_shards, local, used)
    if workflow.is_main_process:
        for line in or_stop(remarks_on, local):
            print(f"warning: {line}", file=sys.stderr)


@cache
def shards_by_block(model):
    """The shards that hold each block's tensors; under None those of embeddings, norm and head."""
    model_config, shard_of, _ = checkpoint_plan(model)
    blocks = or_stop(block_count, model_config)
    found = {}
    for name, shard in shard_of.items():
        found.setdefault(block_of(name, blocks), set()).add(shard)
    return found


def block_numbers(model):
    return list(range(or_stop(block_count, checkpoint_plan(model)[0])))


@cache
def code_and_libraries(script):
    """What scripts/{script}.py computes with, an entry each: a changed one makes the script's results stale."""
    path = Path(workflow.basedir) / "scripts" / f"{script}.py"
    return code_of(path, LIBRARY) + libraries_of(path, LIBRARY)


# Names, by wildcards


def release_of(wildcards):
    return CONFIG.releases[wildcards.release]


def model_of(wildcards):
    return release_of(wildcards).model if hasattr(wildcards, "release") else wildcards.model


def calibration_of(wildcards):
    return release_of(wildcards).calibration if hasattr(wildcards, "release") else wildcards.calibration


def benchmark_of(wildcards):
    return release_of(wildcards).benchmark if hasattr(wildcards, "release") else wildcards.benchmark


def blocks_of(wildcards):
    return block_numbers(model_of(wildcards))


# Source files


def source_path_of(wildcards):
    return source_dir(model_of(wildcards))


@cache
def by_content(model, name):
    """A file of a source; `ancient` if it is the one that its check has seen, whatever its time says.

    Snakemake compares times alone above 1 MB. Who reads the file has the record of its check for an input too, so
    that a file that was changed still makes stale what was made of it.
    """
    path = f"{source_dir(model)}/{name}"
    record = f"results/source/{source_name(model)}/files/{name}.json"
    return ancient(path) if or_stop(is_as_checked, path, record) else path


def source_file(wildcards):
    return by_content(wildcards.model, wildcards.file)


def lock_of(wildcards):
    """The model's lock as a list of one, or of none."""
    return list(filter(None, [lock_file(wildcards.model)]))


def model_asked_for(wildcards):
    """The model of `--config model=NAME`."""
    sources = [name for name, model in CONFIG.models.items() if model.prune is None]
    return or_stop(model_to_lock, config.get("model"), sources)


def source_asked_for(wildcards):
    """Where the model of `--config model=NAME` is: its path, its repository and revision, or its bucket."""
    settings = CONFIG.models[model_asked_for(wildcards)]
    if settings.hub:
        return {"hub": settings.hub, "revision": settings.revision}
    if settings.bucket:
        return {"bucket": settings.bucket}
    return {"path": source_dir(model_asked_for(wildcards))}


def remote_models():
    """A pattern of the models that come from the hub or a bucket; of nothing if none does."""
    found = [name for name, model in CONFIG.models.items() if model.hub or model.bucket]
    return "|".join(map(re.escape, found)) or "(?!)"


def repository_of(wildcards):
    """Where a remote model's files are and go to: repository, commit and directory, or address and directory."""
    source = source_name(wildcards.model)
    settings = CONFIG.models[source]
    if settings.bucket:
        return {
            "bucket": settings.bucket,
            "directory": settings.directory or f"results/source/{source}/bucket",
        }
    return {"hub": settings.hub, "commit": settings.revision, "directory": settings.directory}


@cache
def room_for_downloads(model):
    """Stops a build whose downloads do not fit their disk."""
    place = remote_model(repository_of(SimpleNamespace(model=model)))
    or_warn(check_download_room, model, place, remote_lock(model))


def lock_to_download(wildcards):
    """The lock of a remote model, once there is room for its files."""
    room_for_downloads(wildcards.model)
    return lock_of(wildcards)


def checked_files(wildcards):
    """The records of all files of a model, each checked."""
    return checks(wildcards, checkpoint_plan(model_of(wildcards))[2])


def checks(wildcards, names):
    return [f"results/source/{source_name(model_of(wildcards))}/files/{name}.json" for name in names]


def source_files(wildcards, names):
    """Files of the source, with those that say what is in them: config.json, and the index if there is one."""
    described = {"config.json", INDEX} & set(checkpoint_plan(model_of(wildcards))[2])
    return [by_content(model_of(wildcards), name) for name in sorted({*names, *described})]


def checked_shards(wildcards, block):
    """The shards that hold tensors of a block, or of none of the blocks (None), and the records of their check."""
    files = source_files(wildcards, shards_by_block(model_of(wildcards)).get(block, set()))
    return files + checks(wildcards, [Path(file).name for file in files])


def block_shards(wildcards):
    """The shards that hold a block's tensors, and the records of their check."""
    return checked_shards(wildcards, int(wildcards.block))


def outer_shards(wildcards):
    """The shards that hold embeddings, norm and head, and the records of their check."""
    return checked_shards(wildcards, None)


def all_shards(wildcards):
    """Every shard of the source, and the record of the whole source's check."""
    model = model_of(wildcards)
    return [
        *source_files(wildcards, set(checkpoint_plan(model)[1].values())),
        f"results/source/{source_name(model)}/source.json",
    ]


def source_config(wildcards):
    return by_content(model_of(wildcards), "config.json")


def with_checks(wildcards, names):
    """Files of the source, and the records of their check."""
    return [by_content(model_of(wildcards), name) for name in names] + checks(wildcards, names)


def tokenizer_files(wildcards):
    """Tokenizer and config of the source, and the records of their check."""
    described = ("config.json", INDEX, *TOKENIZER_FILES)
    return with_checks(
        wildcards, [name for name in checkpoint_plan(model_of(wildcards))[2] if name in described]
    )


def carried_names(wildcards):
    """The names of the source's files that a release takes along: of a locked model those of the lock."""
    return carried(checkpoint_plan(model_of(wildcards))[2])


def carried_files(wildcards):
    """What a release takes along of the source beside its weights, config and index, and the records of their check."""
    described = {"config.json", INDEX} & set(checkpoint_plan(model_of(wildcards))[2])
    return with_checks(wildcards, sorted({*carried_names(wildcards), *described}))


# Pruned models


def keep_list(wildcards):
    """The list of the experts that a pruned model has, as a list of one; of none for a model that is not pruned.

    Where the list is made block by block, a job on a block waits for no more than that block's.
    """
    model = model_of(wildcards)
    if (prune := CONFIG.models[model].prune) is None:
        return []
    block = f"_{wildcards.block}" if prune.observe == "sequential" and hasattr(wildcards, "block") else ""
    return [f"results/{model}/prune/keep{block}.json"]


# What has to hold before a job starts


STILL_TO_WRITE = {}


@cache
def settings_of(release):
    """A release's settings; `keep` has what the engine of its target needs unpacked too."""
    settings = CONFIG.releases[release]
    target = CONFIG.targets[settings.deploy.target]
    return for_engine(settings, checkpoint_plan(settings.model)[0]["model_type"], target)


@cache
def preflight(release):
    """Ends the planning if a release can't be quantized for its target, or has no room beside those before it."""
    settings = settings_of(release)
    model, target = settings.model, settings.deploy.target
    model_config, shard_of, files = checkpoint_plan(model)
    scheme, blocks = SCHEMES[settings.scheme], or_stop(block_count, model_config)
    or_stop(check_source, model, shards_by_block(model), blocks, files)
    or_stop(check_group, release, settings, model_config)
    if moe_blocks(model):
        or_stop(check_activation, release, settings, model_config)
    say_once(or_stop(check_linears, release, settings, linear_widths(model_shapes(model).kinds)))
    or_stop(check_scheme, release, scheme, target, CONFIG.targets[target], model_config)
    or_stop(check_family, release, model_config["model_type"], target, CONFIG.targets[target])
    check_target_memory(release)
    kept = CONFIG.keep_hidden_states
    chain = chain_files(
        release, CONFIG.calibrations[settings.calibration], model_config, settings.chained, kept
    )
    for walked, calibration, ends in reference_chains(release):
        at = CONFIG.calibrations[calibration]
        chain |= reference_files(walked, source_name(model), calibration, at, model_config, ends, kept)
    stored = kept_bytes(model, set(shard_of.values()))
    STILL_TO_WRITE.update(files_to_come(release, chain, blocks, stored, scheme.weight_bits))
    or_warn(check_room, STILL_TO_WRITE)


def check_target_memory(release):
    """Ends the planning if a release and the KV cache that is wanted beside it don't fit its target."""
    settings = settings_of(release)
    model, target = settings.model, CONFIG.targets[settings.deploy.target]
    if target.memory_gb is None:
        return
    model_config, pruned = checkpoint_plan(model)[0], CONFIG.models[model].prune is not None
    weights = weight_bytes(
        model_config,
        source_tensors(source_name(model)),
        SCHEMES[settings.scheme],
        settings.keep,
        pruned or settings.mtp == "drop",
        target,
    )
    wanted = wanted_context(target, model_config, CONFIG.calibrations[settings.calibration].seqlen)
    or_stop(check_memory, release, settings.deploy.target, target, weights, model_config, wanted)


@cache
def source_tensors(model):
    """The tensors of a model that is not pruned, by names as in transformers, with their shapes."""
    path = lock_file(model)
    tensors = lock_at(path).tensors if path is not None else or_stop(tensors_of, source_dir(model))
    held = or_stop(entries, without_scales(tensors), checkpoint_plan(model)[0])
    return {name: Shaped(entry.dtype, tuple(entry.shape)) for name, entry in held.items()}


def reference_chains(release):
    """(model, calibration, whether the last block is run) of the chains that a release and its pruning rest on."""
    settings = CONFIG.releases[release]
    name, model = settings.model, CONFIG.models[settings.model]
    if model.prune is None:
        return [(name, settings.calibration, True)]
    walked = [name, *comparisons(name)] if model.prune.observe == "sequential" else []
    decided = [(other, model.prune.calibration, False) for other in walked]
    whole = [(model.source_model, found) for found in (settings.calibration, model.prune.calibration)]
    return [*((other, found, True) for other, found in [(name, settings.calibration), *whole]), *decided]


def shard_bytes(model, shards):
    """Bytes of a model's shards, from its lock where it has one."""
    if (path := lock_file(model)) is not None:
        files = lock_at(path).files
        return sum(files[name].size for name in shards)
    return sum(os.path.getsize(f"{source_dir(model)}/{name}") for name in shards)


def kept_bytes(model, shards):
    """`shard_bytes`, of a pruned model in proportion to its experts, which is less than it takes of them."""
    stored, settings = shard_bytes(model, shards), CONFIG.models[model]
    if settings.prune is None:
        return stored
    kept, before = (routed_experts(checkpoint_plan(name)[0]) for name in (model, settings.source_model))
    return stored * kept // before


# Calibration and the reference chain


def calibration_config(wildcards):
    """A calibration's settings, its texts where they are found."""
    settings = CONFIG.calibrations[wildcards.calibration].model_dump(mode="json")
    for source in [*settings["sources"], *(settings["heldout"]["sources"] or [])]:
        source["path"] = located(source["path"])
    return settings


def calibration_texts(wildcards):
    """The text files of a calibration, held-out ones included; its samples must fit the model's context."""
    name, model = wildcards.calibration, wildcards.model
    or_stop(check_context, name, CONFIG.calibrations[name], model, checkpoint_plan(model)[0])
    paths = or_stop(text_files, wildcards.calibration, calibration_config(wildcards))
    record = f"results/calibration/{model}/{name}/calibration.json"
    return [
        path if made_here(path) or not or_stop(is_as_read, path, record) else ancient(path) for path in paths
    ]


def calibration_folder(wildcards):
    """Where the tokens of a calibration are: a pruned model has its source's."""
    return f"results/calibration/{source_name(model_of(wildcards))}/{calibration_of(wildcards)}"


def tokens_of(wildcards):
    return f"{calibration_folder(wildcards)}/tokens.safetensors"


def calibration_record(wildcards):
    return f"{calibration_folder(wildcards)}/calibration.json"


def hidden_states(path):
    """An output of hidden states: by the config it stays, or goes as soon as the last job that reads it is done."""
    return path if CONFIG.keep_hidden_states else temp(path)


def chain_file(wildcards, block):
    """Hidden states of the reference chain after `block`; after the embedding for -1."""
    name = "embedded" if block < 0 else f"hidden_{block}"
    return f"results/reference/{model_of(wildcards)}/{calibration_of(wildcards)}/{name}.safetensors"


def reference_before(wildcards):
    return chain_file(wildcards, int(wildcards.block) - 1)


def reference_after(wildcards):
    return chain_file(wildcards, int(wildcards.block))


def heldout_file(wildcards, block):
    """`chain_file` of the held-out tokens."""
    return str(heldout_beside(chain_file(wildcards, block)))


def heldout_before(wildcards):
    return heldout_file(wildcards, int(wildcards.block) - 1)


def heldout_chain(wildcards):
    """The whole chain of the held-out tokens, embeddings first."""
    return [heldout_file(wildcards, block) for block in [-1, *blocks_of(wildcards)]]


def routing_records(wildcards):
    folder = f"results/reference/{model_of(wildcards)}/{calibration_of(wildcards)}"
    return [f"{folder}/routing_{block}.json" for block in blocks_of(wildcards)]


# Quantization


def tuning_inputs(wildcards):
    """What a block is tuned on: the output of the quantized blocks before it, or of the source's."""
    preflight(wildcards.release)
    block, settings = int(wildcards.block), release_of(wildcards)
    if not settings.chained or block % (settings.tuning.segment or len(blocks_of(wildcards))) == 0:
        return chain_file(wildcards, block - 1)
    return f"results/{wildcards.release}/chain/{block - 1}.safetensors"


def made_by(rule):
    """A pattern of the releases whose blocks a rule makes; of nothing if there are none."""
    found = [name for name, release in CONFIG.releases.items() if release.made_by == rule]
    return "|".join(map(re.escape, found)) or "(?!)"


def shards_to_copy(wildcards):
    """`block_shards` of a release that can be made."""
    preflight(wildcards.release)
    return block_shards(wildcards)


def tuning_config(wildcards):
    return release_of(wildcards).tuning.model_dump(mode="json")


def tuning_threads(wildcards):
    return release_of(wildcards).tuning.threads


def device(_):
    """What models run on."""
    return CONFIG.device


def gpus(wildcards):
    return 0 if device(wildcards) == "cpu" else 1


def tuning_gpus(wildcards):
    return 0 if release_of(wildcards).tuning.device == "cpu" else 1


def scheme_of_release(wildcards):
    return release_of(wildcards).scheme


def mtp_of_release(wildcards):
    return release_of(wildcards).mtp


def keep_patterns(wildcards):
    return settings_of(wildcards.release).keep


def tuners_first(wildcards):
    """The priority of a block of a release: before the chain, which else runs away from those who read it; those of
    the load test before the others."""
    return 1 + int(int(wildcards.block) < load_test_blocks(wildcards.release))


def files_of_blocks(wildcards, blocks):
    """Blocks of a release, which was looked at whether it is as the build left it.

    As files of a source, they are `ancient` where they are what was packed; their records are inputs too.
    """
    release = wildcards.release
    as_left(release)
    paths = {block: f"results/{release}/blocks/{block}.safetensors" for block in blocks}
    return [ancient(path) if or_stop(is_as_packed, release, block) else path for block, path in paths.items()]


def records_of_blocks(wildcards, blocks):
    return [f"results/{wildcards.release}/blocks/{block}.json" for block in blocks]


def block_files(wildcards):
    return files_of_blocks(wildcards, blocks_of(wildcards))


def block_records(wildcards):
    return records_of_blocks(wildcards, blocks_of(wildcards))


# The load test


@cache
def moe_blocks(model):
    """The numbers of a model's blocks that have experts."""
    model_config, shard_of, _ = checkpoint_plan(model)
    names = or_stop(places, shard_of, model_config)
    return list(expert_counts(names, or_stop(block_count, model_config)))


@cache
def load_test_blocks(release):
    """How many of a release's blocks are served before the others are made; 0 if there is no load test."""
    settings = CONFIG.releases[release]
    blocks, moe = len(block_numbers(settings.model)), moe_blocks(settings.model)
    return blocks_to_load(settings.deploy.load_test_blocks, blocks, moe)


def first_blocks(wildcards):
    """The blocks of the load test, if its engine can be started."""
    release = wildcards.release
    engine_can_start(release)
    or_stop(check_load_test, release, load_test_blocks(release))
    return files_of_blocks(wildcards, range(load_test_blocks(release)))


def first_records(wildcards):
    return records_of_blocks(wildcards, range(load_test_blocks(wildcards.release)))


def keep_list_of_first(wildcards):
    """`keep_list`, of the last block of the load test where it is made block by block."""
    last = load_test_blocks(wildcards.release) - 1
    return keep_list(SimpleNamespace(release=wildcards.release, block=last))


def load_test_record(wildcards):
    """The record of the load test as a list of one; of none where there is none."""
    release = wildcards.release
    return [f"results/{release}/load_test.json"] if load_test_blocks(release) else []


# The packed release


def left_at(outputs):
    """When their jobs left `outputs`, in ns, by Snakemake's own records; of none after a job that was cut.

    The records have seconds as a float, exact to less than a microsecond, which is added.
    """
    if any(Path(".snakemake/incomplete").glob("*")):
        return {}
    records = {path: workflow.persistence.metadata(IOFile(path)) for path in outputs}
    return {
        path: int(record.endtime * 1e9) + 1000
        for path, record in records.items()
        if record and record.endtime
    }


@cache
def as_left(release):
    """Has files of a finished release made again that are gone; stops the build if one was changed by hand.

    Snakemake notices neither: the outputs behind a gone file are there, and nothing has the shards for outputs.
    """
    if not workflow.is_main_process:
        return
    wildcards = SimpleNamespace(release=release)
    model = f"results/{release}/model"
    own = [f"{model}/{name}" for name in ("config.json", INDEX, "README.md", "provenance.json")]
    stages = ("verify", "evaluate", "deploy", "throughput", "benchmark")
    own += [f"results/{release}/{stage}.json" for stage in stages]
    own += [*load_test_record(wildcards), *served_records(wildcards)]
    own += [*release_pictures(wildcards), *saliency_picture(wildcards)]
    workflow.dag.forcefiles.update(or_stop(gone, release, len(blocks_of(wildcards)), own))
    or_warn(check_release, release, left_at(own))


def packed_files(wildcards):
    """Files of results/{release}/model that the build has to have before it reads the release."""
    return [f"results/{wildcards.release}/pack.json"]


def limits_of(wildcards):
    return list(verify_limits(release_of(wildcards)) or ())


def verify_samples(wildcards):
    return release_of(wildcards).verify.public_decoder_samples


DEMO_DOCUMENTS = {
    "calibration/stories": 12_000,
    "calibration/exercises": 40_000,
    "test/stories": 400,
    "test/exercises": 1_400,
}


def demo_documents(wildcards):
    """Documents of a demo text: enough for 512 samples of 2048 tokens, and a few minutes of benchmarks."""
    return DEMO_DOCUMENTS[f"{wildcards.split}/{wildcards.kind}"]


# Serving


def files_to_serve(wildcards):
    """`packed_files`, if the deploy stage can start the engine of the release's target."""
    engine_can_start(wildcards.release)
    return packed_files(wildcards)


@cache
def engine_can_start(release):
    """Stops a build on a machine that lacks what the target of a release needs.

    What this machine has says nothing of the one that a cluster's job will run on, nor of a release that was served.
    """
    name = CONFIG.releases[release].deploy.target
    if workflow.local_exec and not Path(f"results/{release}/deploy.json").exists():
        or_warn(check_here, release, name, CONFIG.targets[name])


def deploy_config(wildcards):
    return release_of(wildcards).deploy.model_dump(mode="json")


def serving_target(wildcards):
    """The name of the target that a release, or the source of one, is served at."""
    return release_of(wildcards).deploy.target if hasattr(wildcards, "release") else wildcards.target


def target_config(wildcards):
    """What is served, without what is said of it to people."""
    told = {"description", "limits", "tested"}
    return CONFIG.targets[serving_target(wildcards)].model_dump(mode="json", exclude=told)


def serving_gpus(wildcards):
    """GPUs that the engine of a target takes."""
    target = CONFIG.targets[serving_target(wildcards)]
    return 0 if target.device == "cpu" else target.devices


# Benchmarks


def benchmark_config(wildcards):
    return CONFIG.benchmarks[benchmark_of(wildcards)].model_dump(mode="json", exclude={"hub", "served"})


def benchmark_folder(wildcards):
    """The directory of a benchmark's task files; empty if it has lm-eval's own tasks alone."""
    include_path = CONFIG.benchmarks[benchmark_of(wildcards)].include_path
    return located(include_path) if include_path else ""


def files_given(paths, benchmark):
    """Files that a benchmark names, if Snakemake can be given them."""
    for path in paths:
        or_stop(check_path, path, f"benchmarks.{benchmark}")
    return paths


def benchmark_files(wildcards):
    """The task files of a benchmark and the data files they name."""
    folder = benchmark_folder(wildcards)
    name = benchmark_of(wildcards)
    found = files_given(or_stop(task_inputs, Path(folder) if folder else None), name)
    known_tasks(f"benchmarks.{name}.tasks", tuple(CONFIG.benchmarks[name].tasks), folder)
    return found


@cache
def known_tasks(key, tasks, folder):
    """Stops the planning if lm-eval lacks one of these tasks; the jobs of a build don't ask again."""
    if workflow.is_main_process:
        or_stop(check_tasks, key, tasks, Path(folder) if folder else None)


def source_scores(wildcards):
    """The source model's scores on a release's benchmark."""
    return f"results/reference/{model_of(wildcards)}/benchmark/{benchmark_of(wildcards)}.json"


# Benchmarks of the served model


def served_of(wildcards):
    """The settings of one benchmark of the served model."""
    return CONFIG.benchmarks[benchmark_of(wildcards)].served[wildcards.task]


def served_config(wildcards):
    """What the answers depend on: neither what they are held against, nor which score is the benchmark's."""
    return served_of(wildcards).model_dump(mode="json", exclude={"expected", "source", "metric"})


def served_comparison_config(wildcards):
    """What the scores are held against."""
    settings = served_of(wildcards)
    return settings.model_dump(mode="json", include={"task", "expected", "source", "metric"})


def served_data(wildcards):
    """The directory of a benchmark's published files; empty if they come from elsewhere."""
    data = served_of(wildcards).data
    return located(os.path.expanduser(data)) if data else ""


@cache
def sandbox_is_here():
    """Stops a build whose models' programs could run nowhere on this machine, if jobs run on it."""
    if workflow.local_exec:
        or_warn(which_sandbox, CONFIG.sandbox)


def served_task_files(wildcards):
    """What the prompts of a benchmark are made of: published files, or files of tasks of one's own; none of the hub."""
    name, settings = benchmark_of(wildcards), served_of(wildcards)
    key = f"benchmarks.{name}.served.{wildcards.task}"
    if wildcards.task == "humaneval":
        sandbox_is_here()
    if asks_by_chat(wildcards.task, settings):
        model = source_name(model_of(wildcards))
        or_stop(check_chat_template, f"{key}.chat", model, source_dir(model), checkpoint_plan(model)[2])
    if wildcards.task not in PUBLIC:
        known_tasks(f"{key}.task", (settings.task,), benchmark_folder(wildcards))
        return benchmark_files(wildcards)
    folder = served_data(wildcards)
    found = list(map(str, or_stop(published_files, wildcards.task, Path(folder)))) if folder else []
    return files_given(found, benchmark_of(wildcards))


def published_folders(wildcards):
    """{task: directory} of the served benchmarks of a release whose published files are here."""
    served = CONFIG.benchmarks[benchmark_of(wildcards)].served
    return {task: located(os.path.expanduser(entry.data)) for task, entry in served.items() if entry.data}


def published_of(wildcards):
    """The files in these directories that are read."""
    folders = published_folders(wildcards).items()
    found = [str(path) for task, folder in folders for path in or_stop(published_files, task, Path(folder))]
    return files_given(found, benchmark_of(wildcards))


def served_source_model(wildcards):
    """The checkpoint that a release is made from, before any pruning."""
    return source_name(model_of(wildcards))


def served_source(wildcards):
    """The source model's scores and rows through a release's target; nothing if they are not measured."""
    if served_of(wildcards).source != "measured":
        return []
    place = f"{served_source_model(wildcards)}/served_benchmarks/{serving_target(wildcards)}"
    stem = f"results/reference/{place}/{benchmark_of(wildcards)}/{wildcards.task}"
    return [f"{stem}.json", f"{stem}.samples.jsonl"]


def served_records(wildcards):
    """The records of a release's benchmarks of the served model."""
    names = CONFIG.benchmarks[benchmark_of(wildcards)].served
    return [f"results/{wildcards.release}/served_benchmarks/{name}.json" for name in names]


def sandbox_config(_):
    return CONFIG.sandbox.model_dump(mode="json")


# Pruning


def observed(wildcards):
    """What a pruned model's experts are observed on, as wildcards: its source, and the calibration."""
    model = CONFIG.models[wildcards.model]
    return SimpleNamespace(model=model.source_model, calibration=model.prune.calibration)


def observed_tokens(wildcards):
    return tokens_of(observed(wildcards))


def observed_record(wildcards):
    return calibration_record(observed(wildcards))


def original_chain(wildcards):
    """The whole reference chain of a pruned model's source."""
    return heldout_chain(observed(wildcards))


def pruned_before(wildcards):
    """The pruned model's own chain before a block."""
    own = SimpleNamespace(model=wildcards.model, calibration=observed(wildcards).calibration)
    return chain_file(own, int(wildcards.block) - 1)


def saliency_tables(wildcards):
    """The table of every block that a keep list is made from."""
    seen = observed(wildcards)
    folder = f"results/reference/{seen.model}/{seen.calibration}"
    if CONFIG.models[wildcards.model].prune.observe == "sequential":
        folder = f"results/{wildcards.model}/prune"
    return [f"{folder}/saliency_{block}.csv" for block in blocks_of(wildcards)]


def pruning_of(wildcards):
    """What requant.keep_list.Pruning holds of a pruned model: neither how its number was given, nor comparisons."""
    model = CONFIG.models[wildcards.model]
    source_config = checkpoint_plan(model.source_model)[0]
    return {
        "model": wildcards.model,
        "source": model.source_model,
        **model.prune.model_dump(include={"method", "observe", "calibration", "seed"}),
        "experts_before": routed_experts(source_config),
        "experts": kept_experts(wildcards.model, model.prune, source_config),
        "groups": group_count(source_config),
    }


def end_of_original(wildcards):
    """The end of the chain of the model that a release's model is pruned from, as a list of one; else of none."""
    source = CONFIG.models[model_of(wildcards)].source_model
    if source is None:
        return []
    seen = SimpleNamespace(model=source, calibration=calibration_of(wildcards))
    return [heldout_chain(seen)[-1]]


def comparisons(model):
    """The models that a pruned model is held against, pruned by other methods."""
    return [f"{model}.{method}" for method in CONFIG.models[model].prune.compare]


def evidence(wildcards):
    """The records that tell of the pruning of a release's model; none if it is not pruned."""
    model = model_of(wildcards)
    if CONFIG.models[model].prune is None:
        return []
    pruned = SimpleNamespace(model=model)
    names, seen = [model, *comparisons(model)], observed(pruned)
    return [
        *[f"results/{name}/prune/{record}.json" for name in names for record in ("keep", "evaluate")],
        *[
            f"results/reference/{name}/benchmark/{benchmark_of(wildcards)}.json"
            for name in (seen.model, *names)
        ],
        *saliency_tables(pruned),
        *routing_records(seen),
        observed_record(pruned),
    ]


def saliency_picture(wildcards):
    """The heat map of a release's card, as a list of one; of none for a model that is not pruned."""
    pruned = CONFIG.models[model_of(wildcards)].prune is not None
    return [f"results/{wildcards.release}/model/saliency.png"] if pruned else []


def saliency_pictures(_):
    return [picture for wildcards in built() for picture in saliency_picture(wildcards)]


def keep_list_of(wildcards):
    return f"results/{model_of(wildcards)}/prune/keep.json"


def tables_of(wildcards):
    return saliency_tables(SimpleNamespace(model=model_of(wildcards)))


# Cards


def shared_records(wildcards):
    """The records that a release shares with others of its model: source, tokens, routing, scores, pruning."""
    model = model_of(wildcards)
    return [
        *evidence(wildcards),
        f"results/source/{source_name(model)}/source.json",
        calibration_record(wildcards),
        *routing_records(wildcards),
        f"results/reference/{model}/benchmark/{benchmark_of(wildcards)}.json",
    ]


def release_records(wildcards):
    """Every record that the card of a release reads."""
    own = [
        f"results/{wildcards.release}/{stage}.json"
        for stage in ("pack", "verify", "evaluate", "deploy", "throughput", "benchmark")
    ]
    own += [*load_test_record(wildcards), *served_records(wildcards)]
    found = [*shared_records(wildcards), *block_records(wildcards), *own]
    return list(dict.fromkeys(found))


def built():
    """The releases of the build, as wildcards."""
    return [SimpleNamespace(release=release) for release in CONFIG.build]


def build_records(_):
    """The records of all releases of the build; asked for when a card is, so that a lock can be made before."""
    return list(dict.fromkeys(record for wildcards in built() for record in release_records(wildcards)))


# Publishing


def config_alone(wildcards):
    """The config that builds a release by itself, as its provenance can hold it."""
    alone = standalone(CONFIG, wildcards.release, settings_of(wildcards.release).keep)
    or_stop(check_config, wildcards.release, alone)
    return alone


def base_model_of(wildcards):
    return CONFIG.models[model_of(wildcards)].base_model


def source_of_release(wildcards):
    return f"results/source/{source_name(model_of(wildcards))}/source.json"


def tokens_observed(wildcards):
    """The record of the tokens that a pruned model's experts were observed on, as a list of one; else of none."""
    model = model_of(wildcards)
    return [observed_record(SimpleNamespace(model=model))] if CONFIG.models[model].prune else []


def environment_locks():
    """What the locks of the checkout say, as digests: neither their times nor its place make a release stale."""
    paths = sorted([*Path(workflow.basedir).glob("envs/*.lock"), *Path(workflow.basedir).glob("flake.lock")])
    return [f"{path.name} {file_entry(path).sha256[:12]}" for path in paths]


def hub_tasks(wildcards):
    """The tasks of a release's benchmark that are benchmarks of the hub; none of a trial, whose scores are not."""
    benchmark = CONFIG.benchmarks[benchmark_of(wildcards)]
    tasks = {} if benchmark.limit else benchmark.hub
    return {name: task.model_dump(mode="json") for name, task in tasks.items()}


def files_beside(wildcards):
    """What is published beside the files that were packed."""
    names = ["README.md", "provenance.json", "sbom.cdx.json"]
    names += [".eval_results/requant.yaml"] if hub_tasks(wildcards) else []
    found = [f"results/{wildcards.release}/model/{name}" for name in names]
    return [*found, *release_pictures(wildcards), *saliency_picture(wildcards)]


def signing_key(_):
    """The path of the key that releases are signed by. Stops the planning if it can't be used."""
    path = os.path.expanduser(CONFIG.publish.signing_key)
    or_stop(check_key, path)
    return path


def publishing(wildcards):
    """The rules that a release goes through to be published, and others do not."""
    return [
        *(["eval_results"] if hub_tasks(wildcards) else []),
        *(["sign"] if CONFIG.publish.signing_key else []),
    ]


def publish_subjects(_):
    """What requant.publishing.Subject holds of each release that `snakemake publish` is asked for."""
    asked = or_stop(releases_asked, CONFIG, config.get("release"))
    return [
        publish_subject(SimpleNamespace(release=release), repository) for release, repository in asked.items()
    ]


def publish_subject(wildcards, repository):
    folder = Path("results") / wildcards.release / "model"
    return {
        "release": wildcards.release,
        "repository": repository,
        "branch": CONFIG.publish.branch,
        "private": CONFIG.publish.private,
        "config": config_alone(wildcards),
        "beside": [str(Path(path).relative_to(folder)) for path in files_beside(wildcards)],
        "signed": CONFIG.publish.signing_key is not None,
    }


def upload_wanted(_):
    """Whether `--config upload=true` asks for more than a dry run."""
    return or_stop(upload_asked, config.get("upload"))


def release_hashes():
    """What is made last of each release: its hashes, and its signature if there is a key."""
    names = ["SHA256SUMS", *(["model.sig"] if CONFIG.publish.signing_key else [])]
    return [f"results/{release}/model/{name}" for release in CONFIG.build for name in names]


def release_provenance():
    return [f"results/{release}/model/provenance.json" for release in CONFIG.build]


def release_pictures(wildcards):
    """The pictures of a release's losses and errors; a release in BF16 has none."""
    names = ("loss", "hidden_states") if SCHEMES[release_of(wildcards).scheme].quantizes else ()
    return [f"results/{wildcards.release}/model/{name}.png" for name in names]


def build_pictures(_):
    """The pictures of losses and errors, if a release of the build is quantized."""
    found = [release_pictures(wildcards) for wildcards in built()]
    return ["results/card/loss.png", "results/card/hidden_states.png"] if any(found) else []


def expert_pictures(_):
    """The heat map of experts, if a model of the build has any."""
    plans = [checkpoint_plan(model_of(wildcards)) for wildcards in built()]
    counts = (
        expert_counts(or_stop(places, names, model), or_stop(block_count, model)) for model, names, _ in plans
    )
    return ["results/card/experts.png"] if any(counts) else []


def config_files():
    """The files of --configfile as a card may name them: those outside of this directory by their name alone."""
    here = Path.cwd()
    return [
        str(path.relative_to(here)) if path.is_relative_to(here) else path.name
        for path in map(Path, workflow.overwrite_configfiles)
    ]


def card_subject(wildcards):
    """What requant.card.load_release asks for, to find and describe the records of a release."""
    model = CONFIG.models[model_of(wildcards)]
    return {
        "release": wildcards.release,
        "model": model_of(wildcards),
        "source": source_name(model_of(wildcards)),
        "calibration": calibration_of(wildcards),
        "benchmark": benchmark_of(wildcards),
        "blocks": len(blocks_of(wildcards)),
        "base_model": model.base_model,
        "license": model.license,
        "configfiles": config_files(),
        "compare": comparisons(model_of(wildcards)) if model.prune else None,
        "served": list(CONFIG.benchmarks[benchmark_of(wildcards)].served),
        "load_test": bool(load_test_record(wildcards)),
    }


def card_subjects(_):
    return [card_subject(wildcards) for wildcards in built()]


# Plans


def plan_subject(release):
    """What requant.plan.Subject holds of a release. A remote model has to have its lock."""
    settings = CONFIG.releases[release]
    if is_remote(settings.model):
        remote_lock(settings.model)
    return {
        "release": release,
        "settings": settings.model_dump(mode="json"),
        "calibration": CONFIG.calibrations[settings.calibration].model_dump(mode="json"),
        "target": CONFIG.targets[settings.deploy.target].model_dump(mode="json"),
        "source": source_dir(settings.model),
        "lock": lock_file(settings.model),
        "device": CONFIG.device,
        "keep_hidden_states": CONFIG.keep_hidden_states,
        "publishing": publishing(SimpleNamespace(release=release)),
        "served": {
            name: entry.source == "measured"
            for name, entry in CONFIG.benchmarks[settings.benchmark].served.items()
        },
        "repository": (
            repository_of(SimpleNamespace(model=settings.model)) if is_remote(settings.model) else None
        ),
    } | pruning_subject(settings.model)


def pruning_subject(model):
    """What requant.plan.Subject holds of how a model is pruned; None for one that is not."""
    settings = CONFIG.models[model]
    if settings.prune is None:
        return dict.fromkeys(("pruned_from", "prune", "observed"))
    return {
        "pruned_from": settings.source_model,
        "prune": settings.prune.model_dump(mode="json"),
        "observed": CONFIG.calibrations[settings.prune.calibration].model_dump(mode="json"),
    }


def plan_subjects(_):
    return [plan_subject(release) for release in CONFIG.build]


# What a job asks of a cluster


def memory_of(name):
    """The function that gives a job of `name` its memory, in MB, more with each attempt."""

    def megabytes(wildcards, attempt):
        return memory_mb(need_of(name, wildcards), 0 if workflow.local_exec else planned_tensors(), attempt)

    return megabytes


def run_time_of(name):
    """The function that gives a job of `name` its time, in minutes, more with each attempt."""

    def minutes(wildcards, attempt):
        return run_minutes(need_of(name, wildcards), attempt)

    return minutes


def need_of(name, wildcards):
    """What a job of `name` takes. Where nothing more is known, it imports no torch and reads records alone."""
    if name in ("source_file", "download"):
        rate = {"rate": DOWNLOAD_RATE} if name == "download" else {}
        return file_need(source_file_bytes(wildcards.model, wildcards.file), **rate)
    if name == "calibrate":
        texts = [path for path in calibration_texts(wildcards) if os.path.exists(path)]
        return text_need(sum(map(os.path.getsize, texts)))
    if name == "measure_served_source":
        return served_need(model_shapes(wildcards.model), CONFIG.targets[wildcards.target])
    if name == "checksums":
        return file_need(
            kept_bytes(model_of(wildcards), set(checkpoint_plan(model_of(wildcards))[1].values()))
        )
    if name in ("observe", "prune_evaluate"):
        seen = observed(wildcards)
        return needs_of_model(seen.model if name == "observe" else wildcards.model, seen.calibration)[name]
    if hasattr(wildcards, "release"):
        return needs_of_release(wildcards.release).get(name, Need(PLAIN))
    if hasattr(wildcards, "model"):
        calibration = getattr(wildcards, "calibration", "default")
        return needs_of_model(wildcards.model, calibration).get(name, Need(PLAIN))
    return Need(PLAIN)


@cache
def needs_of_model(model, calibration):
    settings = CONFIG.calibrations[calibration]
    return model_needs(model_shapes(model), stored_bytes(model), settings, rates_of(CONFIG.device))


@cache
def needs_of_release(release):
    settings = settings_of(release)
    return release_needs(
        model_shapes(settings.model),
        stored_bytes(settings.model),
        settings,
        CONFIG.calibrations[settings.calibration],
        CONFIG.targets[settings.deploy.target],
        load_test_blocks(release),
        rates_of(settings.tuning.device),
        rates_of(CONFIG.device),
    )


@cache
def model_shapes(model):
    """A model by the shapes of its tensors."""
    pruned = CONFIG.models[model].prune is not None
    return shapes_of(checkpoint_plan(model)[0], source_tensors(source_name(model)), pruned)


@cache
def rates_of(device):
    """How fast a device works, as it was measured."""
    return or_stop(read_rates, Path(workflow.basedir) / "benchmarks/results/rates.json", device)


@cache
def stored_bytes(model):
    """Bytes of the shards that a model is read from."""
    return shard_bytes(model, set(checkpoint_plan(model)[1].values()))


def source_file_bytes(model, name):
    """Bytes of a file of a source: from its lock, where it has one."""
    if (path := lock_file(model)) is not None and name in lock_at(path).files:
        return lock_at(path).files[name].size
    path = f"{source_dir(model)}/{name}"
    return os.path.getsize(path) if os.path.exists(path) else 0


@cache
def planned_tensors():
    """Tensors of the largest model of the build, which each submitted job plans again."""
    return max(len(checkpoint_plan(CONFIG.releases[release].model)[1]) for release in CONFIG.build)


def rates_asked_for(_):
    """Rates of files that a plan counts, bytes a second, of `--config disk=2 hub=0.1` (GB)."""
    return or_stop(file_rates, config)

"""Which releases an engine serves on this machine, and how right: benchmarks/results/engines.json.

    python benchmarks/engines.py vllm [--case deepseek_v3 mixtral ...] [--scheme NVFP4 W4A16 ...] [--at-once 4]

Random models of each family, of widths that kernels for GPUs take, in each scheme, all as `requant` makes them: plain
rounding, packed, evaluated. Each is served by the engine as a program, with what the engine needs unpacked in BF16, and
asked by requant's own smoke test. A row says what loaded and by which kernels, what each check found, how far the
log-probabilities are off, how long the start took and how fast it answers; or the engine's own first error. Each row is
written when it is there, and a cell of the table that has one for this version of the engine and this GPU is skipped:
the same command goes on where it was stopped.

    --at-once N     cells at a time, on one GPU
    --table         measures nothing: writes src/requant/engine_runs.csv, which planning reads, from the rows
    --all-packed    nothing stays in BF16 for the engine, and nothing is decoded for it: what it can't do is measured so
    --again         measure cells that have rows once more
    --logs FOLDER   keep each engine's log there, and deploy.failed.json, which has its answers
    --devices N     GPUs a cell: tensor parallel
    --argument A    of the engine, once for each; --variable NAME=VALUE likewise

`transformers` is an engine too, on the CPU if this machine has no GPU.
"""

import argparse
import csv
import io
import json
import os
import re
import shutil
import sys
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from functools import cached_property
from importlib.metadata import PackageNotFoundError, version
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "src"), str(ROOT / "tests")]

import tiny  # noqa: E402

from requant import deploy, engine_log  # noqa: E402
from requant.config import Calibration, Deploy, Release, Target, Tuning  # noqa: E402
from requant.engine_keeps import for_engine  # noqa: E402
from requant.engine_runs import COLUMNS, CPU, TABLE, Run  # noqa: E402
from requant.environment import machine  # noqa: E402
from requant.errors import RequantError  # noqa: E402
from requant.records import (  # noqa: E402
    DeployRecord,
    FailedDeployRecord,
    PackRecord,
    ThroughputRecord,
    read_json,
    write_text,
)
from requant.schemes import SCHEMES  # noqa: E402

KEYS = ("engine", "engine_version", "gpu", "devices", "case", "scheme", "all_packed")  # of a row
OUT = ROOT / "benchmarks/results/engines.json"
BLOCKS = tiny.SIZES["num_hidden_layers"]
COMMON = {"hidden_size": 512, "intermediate_size": 512, "num_attention_heads": 16, "initializer_range": 0.05}
GQA = COMMON | {"num_key_value_heads": 2, "head_dim": 128}
EXPERTS = {"moe_intermediate_size": 256, "num_experts_per_tok": 4}
MLA = (
    COMMON
    | EXPERTS
    | {"num_key_value_heads": 16, "n_routed_experts": 16, "q_lora_rank": 512, "kv_lora_rank": 512}
    | {"qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128}
)
MIXTRAL = GQA | {"intermediate_size": 256, "num_attention_heads": 4}  # engines divide its width by its heads
NO_AUX = {"topk_method": "noaux_tc"}  # DeepSeek's makers write it, and vLLM asks for it


@dataclass(frozen=True)
class Case:
    """A random model: its family, its sizes where they are other than in tests/tiny.py, more keys of config.json."""

    family: str
    sizes: dict
    more: dict


CASES = {
    "deepseek_v3": Case("deepseek_v3", MLA, NO_AUX),
    "deepseek_v3, hidden 576": Case("deepseek_v3", MLA | {"hidden_size": 576}, NO_AUX),
    "deepseek_v32": Case("deepseek_v32", MLA | {"index_n_heads": 64}, NO_AUX),
    "kimi_k2": Case("kimi_k2", MLA, NO_AUX),
    "glm4_moe": Case("glm4_moe", GQA | EXPERTS | {"n_routed_experts": 16}, {}),
    "mixtral": Case("mixtral", MIXTRAL, {}),
    "qwen3_moe": Case("qwen3_moe", GQA | EXPERTS | {"num_experts": 16}, {}),
    "llama": Case("llama", GQA, {}),
    "qwen3": Case("qwen3", GQA, {}),
}
# What engines say in their logs of the kernels that they chose.
KERNEL = re.compile(
    r"Using (?:AttentionBackendEnum\.)?'?([\w.]+)'? (for [\w ]*(?:NVFP4|WNA16|W\dA16)\w*(?: GEMM)?|\w+ MoE backend|"
    r"MLA prefill backend|attention backend)|Using (\w*MoEMethod\w*)|(attention_backend='\w+')"
)
# KV caches of a fixed size, and a fraction that passes the check at the start: engines that measure how much memory is
# free must not count what others take meanwhile. sglang's fraction is of what was free, vLLM's of what must be.
CACHE = {"vllm": ["--kv-cache-memory-bytes=1000000000"], "sglang": ["--max-total-tokens=65536"], "transformers": []}
FRACTION = {"vllm": 0.05, "sglang": 0.85, "transformers": 0.85}
TEXT = Calibration(sources=[{"path": "text.txt"}], nsamples=8, seqlen=256, heldout={"nsamples": 16})


@dataclass(frozen=True, eq=False)
class Cell:
    """One release at one target."""

    case: str
    scheme: str
    target: Target
    all_packed: bool

    @cached_property
    def key(self) -> dict:
        engine, gpu, devices = self.target.engine, self.target.gpu, self.target.devices
        values = (engine, version(engine), gpu, devices, self.case, self.scheme, self.all_packed)
        return dict(zip(KEYS, values, strict=True))


def make_model(case: Case, folder: Path) -> None:
    """A random model in folder/source, its tokens, and the reference chain of hidden states."""
    source = tiny.write_checkpoint(folder / "source", case.family, **case.sizes)
    tiny.edit_config(source, **case.more)
    make_readable(source)
    run_chain(source, folder)


def run_chain(source: Path, folder: Path, device: str = "cpu") -> None:
    """Tokens for the model in `source`, and the reference chain of hidden states, in `folder`."""
    from requant.calibration import make_token_sets
    from requant.chain import embed, run_reference_block

    text = tiny.write_text(folder / "text.txt", 1600)
    asked = TEXT.model_copy(update={"sources": [TEXT.sources[0].model_copy(update={"path": str(text)})]})
    tokens = folder / "tokens.safetensors"
    make_token_sets("random", source, "words", asked, tokens, folder / "tokens.json")
    embed(source, tokens, hidden(folder, 0))
    for block in range(BLOCKS):
        run_reference_block(
            *(source, tokens, hidden(folder, block), block, hidden(folder, block + 1)),
            *(folder / f"routing-{block}.json", folder / f"saliency-{block}.csv", "random", "words"),
            device=device,
        )


def make_readable(source: Path) -> None:
    """Makes all tokens but printable ones unlikely: of parts of a character an API shows nothing, or the same mark for
    each, and which one an engine chose could not be told."""
    from safetensors.torch import load_file, save_file
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(source / "tokenizer.json"))
    texts = tokenizer.decode_batch([[number] for number in range(tokenizer.get_vocab_size())])
    silent = [number for number, text in enumerate(texts) if not text or not text.isprintable() or "\ufffd" in text]
    tied = json.loads((source / "config.json").read_text(encoding="utf-8"))["tie_word_embeddings"]
    name = "model.embed_tokens.weight" if tied else "lm_head.weight"
    index = json.loads((source / "model.safetensors.index.json").read_text(encoding="utf-8"))
    shard = source / index["weight_map"][name]
    tensors = load_file(shard)
    tensors[name][silent] = 0
    save_file(tensors, shard, metadata={"format": "pt"})


def hidden(folder: Path, block: int) -> Path:
    """Where the inputs of a block are."""
    return folder / f"hidden-{block}.safetensors"


def make_release(cell: Cell, model: Path, folder: Path) -> None:
    """The model in that scheme for that engine: model/, pack.json and evaluate.json in `folder`."""
    from requant.disk import heldout_beside
    from requant.evaluate import evaluate

    release = Release(model="random", scheme=cell.scheme, tuning=Tuning(iters=0, inputs="reference"))
    if not cell.all_packed:
        release = for_engine(release, CASES[cell.case].family, cell.target)
    make_checkpoint(release, model, folder)
    chain = [heldout_beside(hidden(model, block)) for block in range(BLOCKS + 1)]
    evaluate(
        *(model / "source", folder / "model", model / "tokens.safetensors", model / "tokens.json", chain),
        *("random", "random", 1, folder / "evaluate.json"),
    )


def make_checkpoint(release: Release, model: Path, folder: Path) -> None:
    """The model as that release: model/ and pack.json in `folder`."""
    from requant.copying import copy_block
    from requant.packing import pack
    from requant.quantize import BlockJob, quantize_block

    source, scheme = model / "source", release.scheme
    for block in range(BLOCKS):
        out, record = folder / f"blocks/{block}.safetensors", folder / f"blocks/{block}.json"
        if not SCHEMES[scheme].quantizes:
            copy_block(source, "random", block, scheme, out, record)
            continue
        job = BlockJob(
            *(source, "random", "random", block, scheme, release.tuning, release.keep, model / "tokens.safetensors"),
            *(hidden(model, block), hidden(model, block + 1)),
        )
        quantize_block(job, out, record, None)
    pack(source, "random", "random", scheme, folder / "blocks", folder / "model", folder / "pack.json")


def measure(cell: Cell, model: Path, folder: Path) -> dict:
    """The row of one cell: the release in `folder` is served and asked."""
    started = time.monotonic()
    if cell.all_packed:
        deploy.why_decoded = lambda *_: None
    log, record, speed = folder / "engine.log", folder / "deploy.json", folder / "throughput.json"
    manifest, failed = folder / "pack.json", folder / "deploy.failed.json"
    row: dict = cell.key | {"arguments": cell.target.arguments, "bytes": read_json(manifest, PackRecord).bytes}
    try:
        deploy.smoke_test(
            *("random", model / "source", folder / "model", manifest, folder / "evaluate.json"),
            *(model / "tokens.safetensors", Deploy(), cell.target, folder / "served", log, 1, record, speed),
        )
    except RequantError as error:
        row["error"] = " ".join(str(error).replace(str(folder), "").split())
    words = engine_log.read(log)
    found: DeployRecord | FailedDeployRecord | None = None
    if record.exists():
        found = read_json(record, DeployRecord)
        levels = read_json(speed, ThroughputRecord).levels
        row |= {"startup_seconds": found.startup_seconds, "weights": found.weights}
        row["tokens_per_second"] = {level.concurrency: level.total_tokens_per_second.median for level in levels}
    elif failed.exists():
        found = read_json(failed, FailedDeployRecord)
    row |= {"served": found is not None, "kernels": kernels_in(words)}
    if found is None:
        row["engine_error"] = engine_log.first_error(words)
    else:
        row |= {"verdict": found.verdict, "arithmetic": found.arithmetic and found.arithmetic.known_from}
        row["checks"] = {check.name: f"{check.verdict}: {check.found or check.reason}" for check in found.checks}
    return row | {"seconds": time.monotonic() - started}


def kernels_in(log: str) -> list[str]:
    """What an engine's log says of its kernels."""
    return sorted({" ".join(filter(None, found)) for found in KERNEL.findall(log)})


def rows_in(out: Path) -> list[dict]:
    return json.loads(out.read_text(encoding="utf-8"))["rows"] if out.exists() else []


def put(out: Path, row: dict, keys: tuple[str, ...] = KEYS) -> None:
    """Writes a row into the file, in place of one that has the same `keys`."""
    rows = [*(other for other in rows_in(out) if any(other[key] != row[key] for key in keys)), row]
    rows.sort(key=lambda row: [str(row[key]) for key in keys])
    write_text(out, json.dumps({"rows": rows}, indent=1) + "\n")


def without_rows(cells: list[Cell], out: Path) -> list[Cell]:
    """Those of the cells that are not measured yet."""
    rows = rows_in(out)
    return [cell for cell in cells if not any(same(row, cell) for row in rows)]


def measure_all(cells: list[Cell], at_once: int, scratch: Path, out: Path, logs: Path | None) -> None:
    """Makes the models and releases that cells need by all cores, serves `at_once`, and writes each row when it is
    there."""
    spawn = get_context("spawn")
    models = {name: scratch / f"model-{number}" for number, name in enumerate(dict.fromkeys(it.case for it in cells))}
    folders = {cell: scratch / f"release-{number}" for number, cell in enumerate(cells)}
    with ProcessPoolExecutor(os.cpu_count(), spawn) as makers, ProcessPoolExecutor(at_once, spawn) as servers:
        for made in [makers.submit(make_model, CASES[name], folder) for name, folder in models.items()]:
            made.result()
        making = {makers.submit(make_release, cell, models[cell.case], folders[cell]): cell for cell in cells}
        serving = {}
        for made in as_completed(making):
            cell = making[made]
            if (error := made.exception()) is not None:
                print(cell.case, cell.scheme, f"is not made: {error}", flush=True)
                continue
            serving[servers.submit(measure, cell, models[cell.case], folders[cell])] = cell
        for served in as_completed(serving):
            cell = serving[served]
            if (error := served.exception()) is not None:
                print(cell.case, cell.scheme, f"is not measured: {error}", flush=True)
                continue
            row = served.result() | {"machine": machine().model_dump()}
            if logs is not None:
                logs.mkdir(parents=True, exist_ok=True)
                name = f"{cell.target.engine} {cell.case} {cell.scheme}".replace(",", "").replace(" ", "-")
                for file in ("engine.log", "deploy.failed.json"):
                    if (folders[cell] / file).exists():
                        shutil.copyfile(folders[cell] / file, logs / f"{name}.{file}")
            put(out, row)
            print(cell.case, cell.scheme, row.get("verdict") or row.get("error"), f"{row['seconds']:.0f} s", flush=True)


def run_of(row: dict) -> Run | None:
    """The line of the table for a row; None if it says nothing of the release: an engine that was too slow, or that
    ended without a word or in the middle of the questions."""
    failed = ", ".join(name for name, found in row.get("checks", {}).items() if found.startswith("failed"))
    told = failed if row["served"] else row.get("engine_error") or ""
    passed, ended = row.get("verdict") == "passed", "before it served" in row.get("error", "")
    if not (passed or told) or (not row["served"] and (not ended or "watchdog timeout" in told)):
        return None
    off = re.search(r"([\d.]+) times as far off", row.get("checks", {}).get("log_probabilities", ""))
    return Run(
        engine=row["engine"],
        version=row["engine_version"],
        gpu=row["gpu"] or CPU,
        case=row["case"],
        scheme=row["scheme"],
        packed="all" if row["all_packed"] else "as planned",
        outcome="refused" if not row["served"] else "served" if passed else "wrong",
        off=off[1] if off else "",
        kernels="; ".join(row["kernels"]),
        told=told,
    )


def write_table(rows: list[dict], path: Path) -> None:
    """The table that planning reads, of rows by one GPU or none."""
    text = io.StringIO()
    lines = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    lines.writeheader()
    runs = [run_of(row) for row in rows if row["devices"] == 1]
    lines.writerows(asdict(run) for run in runs if run is not None)
    write_text(path, text.getvalue())


def same(row: dict, cell: Cell) -> bool:
    return all(row[key] == value for key, value in cell.key.items())


def check_installed(parser: argparse.ArgumentParser, engine: str) -> None:
    """Ends the program with a line if this Python has no such engine."""
    try:
        version(engine)
    except PackageNotFoundError:
        parser.error(f"{engine}: not a package of {sys.executable}; expected it installed there")


def target_of(options: argparse.Namespace) -> Target:
    """The place that cells are served at: this machine."""
    import torch

    settings: dict = {"engine": options.engine, "arguments": options.argument, "startup_seconds": options.startup}
    settings["environment"] = dict(pair.split("=", 1) for pair in options.variable)
    if torch.cuda.is_available():
        major, minor = torch.cuda.get_device_capability()
        settings |= {"device": "cuda", "gpu": f"sm{major}{minor}", "devices": options.devices, "concurrency": 16}
        settings["memory_fraction"] = FRACTION[options.engine]
        settings["arguments"] = CACHE[options.engine] + options.argument
    return Target.model_validate(settings)


def main() -> None:
    schemes = list(SCHEMES)
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("engine", nargs="?", choices=["transformers", "vllm", "sglang"])
    parser.add_argument("--case", nargs="+", choices=list(CASES), default=list(CASES))
    parser.add_argument("--scheme", nargs="+", choices=schemes, default=schemes)
    parser.add_argument("--at-once", type=int, default=1)
    parser.add_argument("--devices", type=int, default=1)
    parser.add_argument("--startup", type=int, default=900, help="seconds that a start may take")
    parser.add_argument("--argument", action="append", default=[])
    parser.add_argument("--variable", action="append", default=[])
    parser.add_argument("--table", action="store_true")
    parser.add_argument("--all-packed", action="store_true")
    parser.add_argument("--again", action="store_true")
    parser.add_argument("--logs", type=Path)
    parser.add_argument("--out", type=Path, default=OUT)
    options = parser.parse_args()
    if options.table:
        return write_table(rows_in(options.out), TABLE)
    if options.engine is None:
        parser.error("expected an engine: transformers, vllm or sglang; or --table")
    check_installed(parser, options.engine)
    target = target_of(options)
    wanted = [Cell(case, scheme, target, options.all_packed) for case in options.case for scheme in options.scheme]
    cells = wanted if options.again else without_rows(wanted, options.out)
    print(f"{len(cells)} cells, {len(wanted) - len(cells)} have rows in {options.out}", flush=True)
    with TemporaryDirectory() as scratch:
        measure_all(cells, options.at_once, Path(scratch), options.out, options.logs)


if __name__ == "__main__":
    main()

"""A flipped bit, or a file cut short, in each kind of artifact and input, its time unchanged, and who finds it."""

import contextlib
import os
import random
import shutil
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from building import Build

from requant import records, safetensors_io
from requant.errors import RequantError
from requant.intact import check_inputs
from requant.locks import check_file, load_lock
from requant.records import read_json
from requant.saliency import read_table

from .scene import CALIBRATION, MODEL, RELEASE, SOURCE, Outcome, error_line, run, same_bytes

REFERENCE, CHAIN = f"results/reference/{SOURCE}/{CALIBRATION}", f"results/reference/{MODEL}/{CALIBRATION}"
TOKENS = f"results/calibration/{SOURCE}/{CALIBRATION}/tokens.safetensors"
OWN, CHECKS = f"results/{RELEASE}", f"results/source/{SOURCE}"
README = f"{OWN}/model/README.md"


@dataclass(frozen=True)
class Victim:
    """A file, and a result of the job that reads it, made anew to have it read. made_from: files to delete to have the
    victim rebuilt, itself if none is named; `restore`: it is an input, or the user's copy is put back."""

    kind: str
    path: str
    read_for: str
    made_from: tuple[str, ...] = ()
    restore: bool = False
    record: type[records.Record] | None = None


def _source(kind: str, path: str, read_for: str) -> Victim:
    return Victim(kind, path, read_for, restore=True)


VICTIMS = (
    _source("source shard", f"models/{SOURCE}/model-00002-of-*.safetensors", f"{OWN}/blocks/1.safetensors"),
    _source("source config.json", f"models/{SOURCE}/config.json", f"{OWN}/blocks/0.safetensors"),
    _source("source index", f"models/{SOURCE}/model.safetensors.index.json", f"{OWN}/blocks/0.safetensors"),
    _source("tokenizer", f"models/{SOURCE}/tokenizer.json", TOKENS),
    _source("lock", f"locks/{SOURCE}.json", f"{CHECKS}/files/*.json"),
    Victim(
        "check of a source file",
        f"{CHECKS}/files/config.json.json",
        f"{CHECKS}/source.json",
        record=records.CheckedFile,
    ),
    Victim("source record", f"{CHECKS}/source.json", README, record=records.SourceRecord),
    Victim("tokens", TOKENS, f"{CHAIN}/embedded.safetensors"),
    Victim(
        "calibration record",
        TOKENS.replace("tokens.safetensors", "calibration.json"),
        f"{OWN}/evaluate.json",
        record=records.CalibrationRecord,
    ),
    Victim("embedded states", f"{CHAIN}/embedded.safetensors", f"{CHAIN}/hidden_0.safetensors"),
    Victim("hidden states", f"{CHAIN}/hidden_0.safetensors", f"{CHAIN}/hidden_1.safetensors"),
    Victim("routing record", f"{CHAIN}/routing_1.json", README, record=records.RoutingRecord),
    Victim("saliency table", f"{REFERENCE}/saliency_1.csv", f"results/{MODEL}/prune/keep.json"),
    Victim("keep list", f"results/{MODEL}/prune/keep.json", f"{CHAIN}/hidden_1.safetensors", record=records.KeepList),
    Victim("chain of a release", f"{OWN}/chain/0.safetensors", f"{OWN}/blocks/1.safetensors"),
    Victim("block", f"{OWN}/blocks/1.safetensors", f"{OWN}/pack.json"),
    Victim("block record", f"{OWN}/blocks/1.json", f"{OWN}/pack.json", record=records.BlockRecord),
    Victim("pack.json", f"{OWN}/pack.json", f"{OWN}/verify.json", record=records.PackRecord),
    Victim(
        "shard of the release",
        f"{OWN}/model/model-00003-of-00003.safetensors",
        f"{OWN}/verify.json",
        (f"{OWN}/pack.json",),
    ),
    Victim("config.json of the release", f"{OWN}/model/config.json", f"{OWN}/verify.json", (f"{OWN}/pack.json",)),
    Victim(
        "index of the release", f"{OWN}/model/model.safetensors.index.json", f"{OWN}/verify.json", (f"{OWN}/pack.json",)
    ),
    Victim("verify record", f"{OWN}/verify.json", README, record=records.VerifyRecord),
    Victim("evaluate record", f"{OWN}/evaluate.json", README, record=records.EvaluateRecord),
    Victim("deploy record", f"{OWN}/deploy.json", README, record=records.DeployRecord),
    Victim("benchmark record", f"{OWN}/benchmark.json", README, record=records.BenchmarkRecord),
    Victim(
        "source scores",
        f"results/reference/{MODEL}/benchmark/tiny.json",
        f"{OWN}/benchmark.json",
        record=records.BenchmarkRecord,
    ),
    Victim("pruning record", f"results/{MODEL}/prune/evaluate.json", README, record=records.PruneEvaluateRecord),
)


def flip_a_bit(path: Path, draw: random.Random) -> str:
    """Flips one bit of the file, anywhere in it, in place: hard links of it have it too."""
    with path.open("r+b") as file:
        place, bit = draw.randrange(path.stat().st_size), draw.randrange(8)
        file.seek(place)
        byte = file.read(1)[0]
        file.seek(place)
        file.write(bytes([byte ^ 1 << bit]))
    return f"bit {bit} of byte {place} flipped"


def cut_short(path: Path, draw: random.Random) -> str:
    """Cuts the file somewhere."""
    length = draw.randrange(path.stat().st_size)
    os.truncate(path, length)
    return f"cut after {length} of its bytes"


Harm = Callable[[Path, random.Random], str]


def harmed_copies(build: Build, victim: Victim, harm: Harm, trials: int, draw: random.Random) -> Counter:
    """How often the code that jobs read with found the harm, its line naming the file, and how often it was harmless:
    what was read is what was written. Each trial on the file as it was."""
    path, found = next(build.directory.glob(victim.path)), Counter()
    kept, times, before = path.read_bytes(), path.stat(), _read(build, victim, path)
    for _ in range(trials):
        harm(path, draw)
        os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
        try:
            found["harmless" if _read(build, victim, path) == before else "NOT FOUND"] += 1
        except RequantError as error:
            named = path.name in str(error) or (victim.kind == "lock" and "the lock" in str(error))
            found["found" if named else "NOT NAMED"] += 1
        path.write_bytes(kept)
        os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    return found


def _read(build: Build, victim: Victim, path: Path) -> object:
    """What a job reads of the file, in a form that compares."""
    safetensors_io._digests_in.cache_clear()
    if victim.kind == "lock":
        lock = load_lock(path)
        for name in lock.files:
            check_file(build.directory / f"models/{SOURCE}", name, lock)
        return lock.model_dump(exclude={"model"})
    if victim.record:
        return read_json(path, victim.record)
    if path.suffix == ".csv":
        return read_table(path).to_csv()
    with contextlib.chdir(build.directory):
        if path.parent.name == SOURCE:
            check_inputs([str(path), f"{CHECKS}/files/{path.name}.json"], str(path.parent))
        elif path.parent.name == "model":
            check_inputs([f"{OWN}/pack.json"])
    if path.suffix != ".safetensors":
        return None
    return {name: safetensors_io.digest(tensor) for name, tensor in safetensors_io.load(path).items()}


def harmed(
    build: Build,
    victim: Victim,
    harm: Harm,
    wanted: dict[str, str],
    draw: random.Random,
) -> Outcome:
    """Does `harm` to a file, its time unchanged, has it read, does what the line says, and builds again.

    A build that takes no notice is harmless if its results are those of the undisturbed build all the same.
    """
    path = next(build.directory.glob(victim.path))
    kept, times = path.read_bytes(), path.stat()
    what = f"{victim.kind}: {harm(path, draw)}"
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    targets = [str(found.relative_to(build.directory)) for found in sorted(build.directory.glob(victim.read_for))]
    before = {name: (build.directory / name).read_bytes() for name in targets}
    for name in targets:
        (build.directory / name).unlink()
    done, seconds = run(build, targets[0], *targets[1:])
    line = error_line(done)
    found = done.returncode != 0 and path.name in line
    if not found and done.returncode == 0:
        after = {name: (build.directory / name).read_bytes() for name in targets}
        binary = all(not name.endswith((".json", ".md")) for name in targets)
        found = None if after == before or not binary else False
    if victim.restore:
        _put_back(path, kept)
    else:
        for name in victim.made_from or (victim.path,):
            (build.directory / name).unlink(missing_ok=True)
    again, more = run(build, targets[0], *targets[1:], f"{OWN}/pack.json")
    alike = again.returncode == 0 and same_bytes(build, wanted)
    how = {True: "found", None: "harmless", False: "NOT FOUND"}[found]
    said = line if found or line else (done.stdout + done.stderr)[-300:] if done.returncode else ""
    if again.returncode:
        said += " THEN " + (error_line(again) or (again.stdout + again.stderr)[-500:])
    return Outcome(what, how, said, alike, seconds + more)


def _put_back(path: Path, contents: bytes) -> None:
    partial = path.with_name(f"{path.name}.new")
    partial.write_bytes(contents)
    shutil.move(partial, path)

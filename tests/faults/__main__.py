"""Does harm to a small build in every way that tests/faults knows, and writes what came of it.

`python -m tests.faults --into DIR [--kills 25] [--flips 100] [--only kills bits disks clocks]`: DIR/faults.json and a
table on the terminal. The exit status is 1 if a fault was not found, or if the last bytes were others.
"""

import argparse
import json
import platform
import random
import sys
import time
from dataclasses import asdict
from pathlib import Path

from building import Build

from . import bits, clocks, disks, kills
from .scene import PACKED, Outcome, copied, digests, emptied, undisturbed

PARTS = ("kills", "bits", "builds", "disks", "clocks")
# The victims whose harm a whole build meets, with the recovery that its line names; all others are read in place.
IN_BUILDS = ("source shard", "hidden states", "chain of a release", "block", "keep list", "shard of the release")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.faults", description=__doc__.splitlines()[0])
    parser.add_argument("--into", type=Path, required=True, help="a directory that is made, for builds and the report")
    parser.add_argument("--kills", type=int, default=25)
    parser.add_argument("--flips", type=int, default=100, help="of each kind of file, and as many cuts")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args(arguments)
    start = time.monotonic()
    build = undisturbed(given.into / "undisturbed")
    report = {"machine": platform.machine(), "undisturbed_seconds": time.monotonic() - start}
    for part in given.only:
        begun = time.monotonic()
        found = RUN[part](build, given)
        report[part] = {"outcomes": found, "seconds": time.monotonic() - begun}
        (given.into / "faults.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
        for outcome in found:
            print("  ".join(f"{value}" for value in outcome.values() if value != ""), flush=True)
    return int(any(_is_bad(outcome) for part in given.only for outcome in report[part]["outcomes"]))


def _is_bad(outcome: dict) -> bool:
    if "same_bytes" in outcome:
        return outcome["how"] == "NOT FOUND" or not outcome["same_bytes"]
    return bool(outcome["NOT FOUND"] or outcome["NOT NAMED"])


def _kills(build: Build, given: argparse.Namespace) -> list[dict]:
    fresh = emptied(build, given.into / "killed")
    return _plain(kills.killed(fresh, PACKED, digests(build), given.kills, longest=30.0, seed=given.seed))


def _bits(build: Build, given: argparse.Namespace) -> list[dict]:
    copy, draw, found = copied(build, given.into / "harmed"), random.Random(given.seed), []
    for harm in (bits.flip_a_bit, bits.cut_short):
        for victim in bits.VICTIMS:
            counts = bits.harmed_copies(copy, victim, harm, given.flips, draw)
            outcomes = {name: counts[name] for name in ("found", "harmless", "NOT FOUND", "NOT NAMED")}
            found.append({"kind": victim.kind, "harm": harm.__name__} | outcomes)
    return found


def _builds(build: Build, given: argparse.Namespace) -> list[dict]:
    copy, draw, wanted = copied(build, given.into / "rebuilt"), random.Random(given.seed), digests(build)
    victims = [victim for victim in bits.VICTIMS if victim.kind in IN_BUILDS]
    return _plain([bits.harmed(copy, victim, bits.flip_a_bit, wanted, draw) for victim in victims])


def _disks(build: Build, given: argparse.Namespace) -> list[dict]:
    copy, wanted = copied(build, given.into / "full"), digests(build)
    with disks.small_disk(copy.directory) as mounted:
        if not mounted:
            print("this user may not mount a small disk: a limit on the size of files instead", file=sys.stderr)
            return _plain([disks.limited_files(copy, "quantize", wanted)])
        full = [disks.full_disk(copy, rule, wanted) for rule in disks.RESULTS]
    copy = copied(build, given.into / "read_only")
    with disks.small_disk(copy.directory / "results"):
        return _plain([*full, disks.read_only(copy, wanted)])


def _clocks(build: Build, given: argparse.Namespace) -> list[dict]:
    wanted, found = digests(build), []
    for number, name in enumerate(clocks.CLOCKS):
        found.append(clocks.clock_set(copied(build, given.into / f"clock_{number}"), name, wanted))
    return _plain([*found, clocks.second_build(copied(build, given.into / "second"), wanted)])


def _plain(outcomes: list[Outcome]) -> list[dict]:
    return [asdict(outcome) for outcome in outcomes]


RUN = {"kills": _kills, "bits": _bits, "builds": _builds, "disks": _disks, "clocks": _clocks}

if __name__ == "__main__":
    sys.exit(main())

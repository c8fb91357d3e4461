"""The command `requant`: rebuild a published release and compare, compare two copies of one, or serve one; take a
build's results to a bucket, or from there.

Exit status of the first two: 0 the checkpoint has the same bytes; 1 the build failed; 2 bad input; 3 it differs, within
the tolerance; 4 it differs by more. `requant serve` ends with 0 when it is told to, with 2 if it can't start; `store`
and `restore` end with 0, or with 2.
"""

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from requant.config import Reproduce
from requant.errors import RequantError
from requant.records import write_json, write_text

BUILD_FAILED, BAD_INPUT = 1, 2
STATUS = "exit status: 0 same bytes, 1 the build failed, 2 bad input, 3 differs within the tolerance, 4 by more"


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    asked = _parser().parse_args(arguments)
    try:
        return asked.run(asked)
    except RequantError as error:
        print("\n".join(f"error: {line}" for line in str(error).splitlines()), file=sys.stderr)
        return BAD_INPUT


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="requant", description="Rebuild, compare and serve releases, and keep builds."
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    rebuild = commands.add_parser(
        "reproduce", help="rebuild a release from its provenance.json, and compare", epilog=STATUS
    )
    rebuild.add_argument("provenance", type=Path, help="provenance.json of a release, or the folder that has it")
    rebuild.add_argument("--into", type=Path, required=True, metavar="DIR", help="a new directory to build in")
    rebuild.add_argument(
        "--inputs",
        type=_input,
        nargs="+",
        action="extend",
        default=[],
        metavar="NAME=PATH",
        help="where a model, text or task is: by its name in the provenance (source/mine), or the last part of it",
    )
    rebuild.add_argument("--cores", default="all", help="for Snakemake; the bytes do not depend on it")
    rebuild.add_argument("--strict", action="store_true", help="stop if a version differs, before anything is built")
    rebuild.add_argument(
        "--weights-only", action="store_true", help="the checkpoint alone: no card, and none of its measurements"
    )
    rebuild.add_argument(
        "--target",
        metavar="NAME",
        help="where to serve, of your own: see docs/targets.md; the published one, if absent",
    )
    rebuild.add_argument(
        "--configfile", type=Path, metavar="FILE", help="a config with `targets`, and a `sandbox`, of your own"
    )
    rebuild.set_defaults(run=_reproduce)
    hold = commands.add_parser("compare", help="compare two copies of a release", epilog=STATUS)
    hold.add_argument("published", type=Path, metavar="PUBLISHED", help="its folder, or its provenance.json alone")
    hold.add_argument("rebuilt", type=Path, metavar="REBUILT", help="folder of the copy")
    hold.add_argument("--record", type=Path, metavar="FILE", help="write what was found as JSON")
    hold.set_defaults(run=_compare)
    serve = commands.add_parser("serve", help="serve a checkpoint at a target until Ctrl-C")
    serve.add_argument("folder", type=Path, metavar="FOLDER", help="the checkpoint: results/{release}/model, or any")
    serve.add_argument("--target", required=True, metavar="NAME", help="where: see docs/targets.md")
    serve.add_argument("--configfile", type=Path, metavar="FILE", help="a config with `targets` of its own")
    serve.add_argument("--port", type=_port, default=8000, help="of the loopback (default: 8000)")
    serve.add_argument("--log", type=Path, default=Path("requant-serve.log"), help="the engine's output")
    serve.add_argument("--dry-run", action="store_true", help="show what would be started, and start nothing")
    serve.add_argument("--json", action="store_true", help="as JSON")
    serve.set_defaults(run=_serve)
    keep = commands.add_parser("store", help="take the results of the build in this directory to a bucket")
    keep.add_argument("bucket", metavar="s3://BUCKET/PREFIX", help="where to: one build a prefix")
    keep.add_argument(
        "--without", nargs="+", action="extend", default=[], metavar="PATTERN", help="paths to leave out: results/x/*"
    )
    keep.set_defaults(run=_store)
    fetch = commands.add_parser("restore", help="bring stored results into this directory, for the build to go on")
    fetch.add_argument("bucket", metavar="s3://BUCKET/PREFIX", help="what `requant store` was given")
    fetch.set_defaults(run=_restore)
    for command in (rebuild, hold):
        command.add_argument(
            "--tolerance",
            type=_limit,
            nargs="+",
            action="extend",
            default=[],
            metavar="KEY=NUMBER",
            help=f"in place of the limits in the release's config: {', '.join(Reproduce.model_fields)}",
        )
    return parser


def _port(text: str) -> int:
    if not (text.isascii() and text.isdigit() and 1 <= int(text) <= 65535):
        raise argparse.ArgumentTypeError(f"{text!r}; expected a number from 1 to 65535")
    return int(text)


def _input(text: str) -> tuple[str, Path]:
    name, _, path = text.partition("=")
    if not (name and path):
        raise argparse.ArgumentTypeError(f"{text!r}; expected NAME=PATH")
    return name, Path(path)


def _limit(text: str) -> tuple[str, float]:
    key, _, number = text.partition("=")
    try:
        return key, getattr(Reproduce.model_validate({key: float(number)}), key)
    except ValueError:
        known = ", ".join(Reproduce.model_fields)
        raise argparse.ArgumentTypeError(f"{text!r}; expected one of {known}, = and a number in its range") from None


def _reproduce(asked: argparse.Namespace) -> int:
    from requant.differences_table import report
    from requant.reproduce import BuildFailed, reproduce

    try:
        made = reproduce(
            asked.provenance,
            asked.into,
            dict(asked.inputs),
            asked.cores,
            asked.strict,
            asked.weights_only,
            dict(asked.tolerance),
            _say,
            asked.target,
            asked.configfile,
        )
    except BuildFailed as error:
        print(f"error: {error}", file=sys.stderr)
        return BUILD_FAILED
    text = report(made.comparison)
    write_json(asked.into / "reproduce.json", made)
    write_text(asked.into / "reproduce.md", text)
    print(text, end="")
    return made.comparison.status


def _compare(asked: argparse.Namespace) -> int:
    from requant.differences_table import report
    from requant.reproduce import compared

    found = compared(asked.published, asked.rebuilt, dict(asked.tolerance))
    if asked.record:
        write_json(asked.record, found)
    print(report(found), end="")
    return found.status


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _store(asked: argparse.Namespace) -> int:
    from requant.stored import store

    found = store(Path(), asked.bucket, asked.without, _say)
    _say(f"{asked.bucket}: {len(found.files)} files and {len(found.links)} links of this build are there")
    return 0


def _restore(asked: argparse.Namespace) -> int:
    from requant.stored import restore

    found = restore(Path(), asked.bucket, _say)
    _say(f"{len(found.files)} files and {len(found.links)} links of {asked.bucket} are here")
    return 0


def _serve(asked: argparse.Namespace) -> int:
    from requant.engine_command import shell
    from requant.reproduce import checkout
    from requant.serve_folder import is_running, planned, served, shown
    from requant.serving import trouble
    from requant.target_files import FOLDER, target_named

    target = target_named(asked.target, asked.configfile, checkout() / FOLDER)
    serving = planned(asked.folder, asked.target, target)
    if asked.dry_run:
        found = shown(serving, asked.port)
        if asked.json:
            print(json.dumps(found, indent=2))
            return 0
        if found["request"] is not None:
            print(f"# what Docker is asked for (containers.create)\n{json.dumps(found['request'], indent=2)}\n")
        if found["decoded"] is not None:
            print(f"# weights decoded to BF16 in a folder of its own: {found['decoded']}")
        variables = [f"{name}={value}" for name, value in found["environment"].items()]
        print(shell([*(["env", *variables] if variables else []), *found["command"]]))
        return 0
    say = _say if not asked.json else (lambda line: None)
    try:
        with served(serving, asked.port, asked.log, say) as server:
            if asked.json:
                print(json.dumps({"url": server.url, "model": server.model, "engine": server.engine}), flush=True)
            say(f"{server.engine} {server.version} at {server.url}/v1, model {server.model!r}; Ctrl-C ends it")
            while is_running(server.pid):
                time.sleep(1)
            became = trouble(server) or "the engine ended by itself"
            raise RequantError(f"{asked.log}: {became}; expected it to run until Ctrl-C: its log says more")
    except KeyboardInterrupt:
        say("stopped")
    return 0

"""The command `requant`: rebuild a published release and compare, or compare two copies of one.

Exit status: 0 the checkpoint has the same bytes; 1 the build failed; 2 bad input; 3 it differs, within the tolerance;
4 it differs by more.
"""

import argparse
import sys
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
    parser = argparse.ArgumentParser(prog="requant", description="Rebuild and compare releases.", epilog=STATUS)
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
    rebuild.set_defaults(run=_reproduce)
    hold = commands.add_parser("compare", help="compare two copies of a release", epilog=STATUS)
    hold.add_argument("published", type=Path, metavar="PUBLISHED", help="its folder, or its provenance.json alone")
    hold.add_argument("rebuilt", type=Path, metavar="REBUILT", help="folder of the copy")
    hold.add_argument("--record", type=Path, metavar="FILE", help="write what was found as JSON")
    hold.set_defaults(run=_compare)
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
            lambda line: print(line, file=sys.stderr, flush=True),
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

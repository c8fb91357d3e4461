"""SHA256SUMS of a release: every file of its folder, in the format of sha256sum."""

from collections.abc import Iterable
from pathlib import Path

from requant.errors import RequantError
from requant.hashing import file_entry
from requant.records import FileEntry, write_text

SUMS, SIGNATURE, SCORES = "SHA256SUMS", "model.sig", ".eval_results/requant.yaml"


def write_sums(folder: Path, packed: dict[str, FileEntry], others: Iterable[str]) -> None:
    """Writes SHA256SUMS of the files in `folder`: those in `packed`, with the hashes they have there, and `others`.

    A signature of earlier hashes is removed, and so are scores for the hub that the config has no more. Raises
    RequantError naming a file that is missing, that is not as it was packed, or that the build did not make.
    """
    names = sorted({*packed, *others})
    for name in {SIGNATURE, SCORES}.difference(names):
        (folder / name).unlink(missing_ok=True)
    found = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    if missing := sorted(set(names) - found):
        raise RequantError(f"{folder / missing[0]}: not there; expected a file of the release")
    if strange := sorted(found - set(names) - {SUMS}):
        raise RequantError(
            f"{folder / strange[0]}: not made by this build; expected the release's files alone: move it away, then "
            "run again"
        )
    digests = {name: file_entry(folder / name).sha256 for name in names}
    for name, entry in packed.items():
        if digests[name] != entry.sha256:
            raise RequantError(
                f"{folder / name}: sha256 {digests[name]} found; pack.json has {entry.sha256}: delete pack.json to "
                "pack it again"
            )
    write_text(folder / SUMS, "".join(f"{digest}  {name}\n" for name, digest in digests.items()))

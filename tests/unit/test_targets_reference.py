"""docs/targets.md and a page for each target are what config/targets/ says."""

from pathlib import Path

from requant.targets_reference import pages

ROOT = Path(__file__).resolve().parents[2]


def test_the_pages_are_what_the_files_say():
    docs = ROOT / "docs"
    for path, text in pages().items():
        assert (docs / path).read_text() == text, "run: python -m requant.targets_reference docs"
    assert {f"targets/{path.name}" for path in docs.glob("targets/*.md")} == pages().keys() - {"targets.md"}

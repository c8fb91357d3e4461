"""Files that are what their record says are told from those that are not, and read no more often than needed."""

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from requant import unchanged
from requant.errors import RequantError
from requant.records import CheckedFile, write_json
from requant.unchanged import check_release, gone, is_as_checked, is_as_packed

SHARD, BLOCK = "results/r/model/model-00001-of-00002.safetensors", "results/r/blocks/0.safetensors"


@pytest.fixture
def read(monkeypatch) -> list[str]:
    """The files whose bytes were read to hash them."""
    seen = []
    entry = unchanged.file_entry
    monkeypatch.setattr(unchanged, "file_entry", lambda path: seen.append(Path(path).name) or entry(path))
    return seen


def digest(path: str) -> str:
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def later(path: str) -> None:
    """Makes a file a minute newer than it is."""
    time = os.stat(path).st_mtime_ns + 60 * 10**9
    os.utime(path, ns=(time, time))


@pytest.fixture
def release(tmp_path, monkeypatch) -> Path:
    """A packed release of one block; its manifest is the newest of its files."""
    monkeypatch.chdir(tmp_path)
    unchanged._hashes.cache_clear()
    unchanged._manifest.cache_clear()
    for path in (SHARD, BLOCK):
        Path(path).parent.mkdir(parents=True)
    Path(BLOCK).write_bytes(b"a block")
    os.link(BLOCK, SHARD)
    names = {"config.json": b"{}", "model-00002-of-00002.safetensors": b"the rest"}
    for name, content in names.items():
        Path("results/r/model", name).write_bytes(content)
    files = {
        path.name: {"size": path.stat().st_size, "sha256": digest(path)} for path in Path("results/r/model").iterdir()
    }
    counts = ("parameters", "quantized_parameters", "blocks", "dense_blocks", "moe_blocks", "routed_experts")
    counts += ("shared_experts", "experts_per_token", "activated_parameters", "bytes", "source_bytes", "seconds")
    text = {"release": "r", "model": "m", "scheme": "NVFP4"}
    record = dict.fromkeys(counts, 1) | text | {"files": files, "bits_per_quantized_weight": 4.5, "hard_linked": True}
    Path("results/r/pack.json").write_text(json.dumps(record))
    Path("results/r/blocks/0.json").write_text("{}")
    return tmp_path


def test_an_untouched_release_is_not_read(release, read):
    check_release("r", {})
    assert is_as_packed("r", 0) and read == []
    assert gone("r", 1, []) == []


def test_a_touched_file_is_read_once(release, read):
    for _ in range(2):
        os.utime(SHARD)
        later(SHARD)
        for _ in range(2):
            unchanged._hashes.cache_clear()
            check_release("r", {})
    assert read == [Path(SHARD).name] * 2, "once for each time that it has, by this process or an earlier one"


def remembered() -> dict[str, list]:
    unchanged._hashes.cache_clear()
    return unchanged._hashes()


def test_each_hash_is_added_to_those_before_it(release):
    """A thousand files are a thousand lines, not half a million: what is written stays as it is."""
    text, place = "", None
    for number in range(20):
        Path(f"{number}").write_text(f"file {number}")
        assert unchanged.hash_of(f"{number}") == digest(f"{number}")
        found = unchanged.HASHES.read_text()
        assert found.startswith(text) and place in (None, unchanged.HASHES.stat().st_ino)
        text, place = found, unchanged.HASHES.stat().st_ino
    assert set(remembered()) == {f"{number}" for number in range(20)}


def test_two_processes_add_to_one_cache(release):
    """Each has read it before the other wrote; what both found is there afterwards."""
    for name in ("a", "b", "c"):
        Path(name).write_text(name)
    unchanged.hash_of("a")
    code = "from requant import unchanged; print(*unchanged._hashes(), flush=True); input(); unchanged.hash_of('c')"
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-c", code], **pipes) as other:
        assert other.stdout.readline() == "a\n"
        unchanged.hash_of("b")
        other.communicate("\n")
    assert other.returncode == 0 and set(remembered()) == {"a", "b", "c"}


@pytest.mark.parametrize(
    "damage",
    [
        '{"a": [1, 2, 3, "of an older',  # killed while it wrote
        "[1]",
        '{"b": 7, "a": null}',
        "\ud800",
        '{"a": [0, 0, 0, "a hash of another time"]}',
    ],
)
def test_a_damaged_cache_costs_no_more_than_a_hash(release, read, damage):
    for name in ("a", "b"):
        Path(name).write_text(name)
    unchanged.hash_of("b")
    with unchanged.HASHES.open("a", encoding="utf-8", errors="surrogatepass") as file:
        file.write(f"\n{damage}")
    unchanged._hashes.cache_clear()
    assert unchanged.hash_of("a") == digest("a") and unchanged.hash_of("b") == digest("b")
    assert {**remembered()}.keys() == {"a", "b"} and read == ["b", "a"], "the other one is still known"


def test_a_cache_of_mostly_old_lines_is_written_anew(release, read, monkeypatch):
    monkeypatch.setattr(unchanged, "MOST_OLD", 3)
    Path("a").write_text("a")
    for _ in range(6):
        unchanged.hash_of("a")
        later("a")
    unchanged.hash_of("a")
    assert len(unchanged.HASHES.read_text().split()) > 6
    size = unchanged.HASHES.stat().st_size
    assert list(remembered()) == ["a"] and unchanged.HASHES.stat().st_size < size / 6
    assert unchanged.hash_of("a") == digest("a") and len(read) == 7


def test_where_no_cache_can_be_written_files_are_hashed_all_the_same(release):
    Path("a").write_text("a")
    Path(".snakemake").write_text("no folder")
    assert unchanged.hash_of("a") == digest("a")


def test_a_change_in_place_names_the_block_that_changed_with_it(release):
    expected = digest(SHARD)
    Path(SHARD).write_bytes(b"A block")
    later(SHARD)
    with pytest.raises(RequantError) as raised:
        check_release("r", {})
    assert str(raised.value) == (
        f"{SHARD}: changed by hand: sha256 {digest(SHARD)} found, results/r/pack.json has {expected}; "
        f"it is one file with {BLOCK}, which was changed with it: "
        "put it back as it was, or delete both, and the build makes them again"
    )
    assert not is_as_packed("r", 0)


def test_another_size_is_noticed_whatever_the_time(release):
    Path("results/r/model/config.json").write_bytes(b"{ }")
    os.utime("results/r/model/config.json", (0, 0))
    with pytest.raises(
        RequantError, match=r"config\.json: changed by hand: .*or delete it, and the build makes it again"
    ):
        check_release("r", {})


def test_outputs_are_compared_with_the_sums_if_they_are_newer_than_their_jobs(release):
    card = Path("results/r/model/README.md")
    card.write_text("a card")
    left = {str(card): card.stat().st_mtime_ns}
    Path("results/r/model/SHA256SUMS").write_text(f"{'0' * 64}  README.md\n{'0' * 64} *unknown.png\n")
    check_release("r", left)
    later(str(card))
    with pytest.raises(RequantError, match=r"README\.md: changed by hand: .*SHA256SUMS has 0{64}"):
        check_release("r", left)


def test_what_is_gone_is_named_by_the_output_that_brings_it_back(release):
    Path(BLOCK).unlink()
    Path("results/r/model/config.json").unlink()
    assert gone("r", 1, ["results/r/verify.json"]) == [BLOCK, "results/r/verify.json", "results/r/pack.json"]
    assert gone("never-built", 1, ["results/never-built/verify.json"]) == []


def test_a_touched_source_is_the_one_that_was_checked(release, read):
    Path("shard").write_bytes(b"weights")
    assert not is_as_checked("shard", "shard.json"), "no check yet"
    write_json("shard.json", CheckedFile(size=7, sha256=digest("shard"), seconds=1))
    assert is_as_checked("shard", "shard.json") and read == []
    later("shard")
    assert is_as_checked("shard", "shard.json") and read == ["shard"]
    Path("shard").write_bytes(b"Weights")
    later("shard")
    later("shard")
    assert not is_as_checked("shard", "shard.json")

"""A release's tokenizer.json is made once, always the same, and reads text as the source's own tokenizer does."""

import base64
import json
import re
import shutil
from pathlib import Path

import pytest
import sentencepiece
import tiktoken
import tiny
from bad_input import edit_json, refused
from transformers import AutoTokenizer

from requant.calibration import make_token_sets
from requant.checkpoint import Checkpoint
from requant.config import Calibration
from requant.copying import copy_block
from requant.errors import RequantError
from requant.packing import pack
from requant.preflight import check_files
from requant.records import PackRecord, read_json
from requant.served_copy import mirror
from requant.tokenizer import TIKTOKEN, check_convertible, made_files, tokenizer_of
from requant.vocabulary import sample

TEXTS = [
    "the cat sat on the mat.",
    "Hello, world! don't DON'T we'RE 'twas",
    "\u4e2d\u6587English\u6df7\u5408 text \u4f60\u597d\u4e16\u754c\uff0c\u6b22\u8fce",
    "  a  b\n\n\nc \t\r\n d   ",
    "In 2024 there were 123456789 events, 3.14",
    "caf\u00e9 \u00e9 \u0939\u093f\u0928\u094d\u0926\u0940 \u01c5 \u02b0",
    "x=1;\r\n y//z\n/* ~~~ */ ",
    "\U0001f642 \ud55c\uad6d\uc5b4",
]
BASE = [bytes([value]) for value in range(256)]
WORDS = [
    b"th",
    b"the",
    b" t",
    b" th",
    b" the",
    b"at",
    b" c",
    b"ca",
    b"12",
    b"123",
    b"\xe4\xb8",
    b"\xe4\xb8\xad",
    b"\n\n",
]
SPECIAL = {
    269: {"content": "[BOS]", "special": True},
    270: {"content": "[EOS]", "special": True},
    272: {"content": "<|im_end|>", "special": True},
    273: {"content": "<think>", "special": False},
}


def write_kimi(directory: Path, ranks: list[bytes] = BASE + WORDS, **changes) -> None:
    """Kimi-K2's tokenizer as its maker publishes it: ranks, names of special tokens, and code."""
    (directory / "tokenizer.json").unlink(missing_ok=True)
    lines = "".join(f"{base64.b64encode(token).decode()} {rank}\n" for rank, token in enumerate(ranks))
    (directory / "tiktoken.model").write_text(lines)
    config = {
        "tokenizer_class": "TikTokenTokenizer",
        "auto_map": {"AutoTokenizer": ["tokenization_kimi.TikTokenTokenizer", None]},
        "added_tokens_decoder": {str(token): entry for token, entry in SPECIAL.items()},
        "bos_token": "[BOS]",
        "eos_token": "[EOS]",
        "model_max_length": 131072,
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(config | changes))
    (directory / "tokenization_kimi.py").write_text("raise SystemExit('code of a checkpoint was run')\n")


@pytest.fixture(scope="module")
def kimi(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("kimi") / "m"
    tiny.write_checkpoint(directory, "kimi_k2", num_hidden_layers=1, vocab_size=320)
    write_kimi(directory)
    return directory


@pytest.fixture
def source(kimi, tmp_path) -> Path:
    return shutil.copytree(kimi, tmp_path / "kimi")


@pytest.fixture(scope="module")
def llama(tmp_path_factory) -> Path:
    """A Llama with tokenizer.model alone."""
    folder = tmp_path_factory.mktemp("llama")
    directory = tiny.write_checkpoint(folder / "m", "llama", num_hidden_layers=1)
    tiny.write_text(folder / "text.txt")
    sentencepiece.SentencePieceTrainer.train(
        input=str(folder / "text.txt"),
        model_prefix=str(folder / "sp"),
        vocab_size=300,
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=2,
        hard_vocab_limit=False,
    )
    (directory / "tokenizer.json").unlink()
    shutil.copy(folder / "sp.model", directory / "tokenizer.model")
    config = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>", "add_bos_token": True}
    (directory / "tokenizer_config.json").write_text(json.dumps(config | {"unk_token": "<unk>", "legacy": False}))
    return directory


def reference(directory: Path) -> tiktoken.Encoding:
    """What the maker's code builds: the pattern, the ranks, and 256 tokens behind them."""
    lines = (directory / "tiktoken.model").read_text().split("\n")
    ranks = {base64.b64decode(line.split()[0]): int(line.split()[1]) for line in lines if line}
    named = {token: entry["content"] for token, entry in SPECIAL.items()}
    behind = range(len(ranks), len(ranks) + 256)
    special = {named.get(token, f"<|reserved_token_{token}|>"): token for token in behind}
    pattern = TIKTOKEN["kimi_k2", "TikTokenTokenizer"].pattern
    return tiktoken.Encoding("kimi", pat_str=pattern, mergeable_ranks=ranks, special_tokens=special)


def ids(tokenizer, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]


# Kimi-K2


def test_the_pattern_is_the_published_one():
    """The SHA-256 that others who pin tokenization_kimi.py give of its pattern."""
    import hashlib

    digest = hashlib.sha256(TIKTOKEN["kimi_k2", "TikTokenTokenizer"].pattern.encode()).hexdigest()
    assert digest == "de5781783b193d5ccf5b1b28edfa70fa816ce78d54603fdc422cfd8d4ea4411f"


@pytest.mark.parametrize("text", TEXTS)
def test_kimis_text_is_split_and_merged_as_tiktoken_does(kimi, text):
    tokenizer, own = tokenizer_of(Checkpoint(kimi)), reference(kimi)
    assert ids(tokenizer, text) == own.encode_ordinary(text)
    assert tokenizer.decode(ids(tokenizer, text)) == text


def test_kimis_special_tokens_have_their_ids_and_names(kimi):
    tokenizer, own = tokenizer_of(Checkpoint(kimi)), reference(kimi)
    assert len(tokenizer) == own.n_vocab == 269 + 256
    for name in own.special_tokens_set:
        token = own.encode_single_token(name)
        assert ids(tokenizer, f"the{name} cat") == own.encode(f"the{name} cat", allowed_special="all")
        assert tokenizer.convert_ids_to_tokens(token) == name
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (269, 270)
    text = tokenizer.decode([269, 97, 272, 273, 300], skip_special_tokens=True)
    assert text == "a<think>", "that one is told to be ordinary text"


def test_random_text_is_read_alike(kimi):
    import random

    draw, tokenizer, own = random.Random(0), tokenizer_of(Checkpoint(kimi)), reference(kimi)
    letters = "aB'sT \n\r\t0129.,/_~\u00e9\u0301\u4e2d\u6587\u3042\u01c5\u0e01\u20ac"
    for _ in range(300):
        text = "".join(draw.choices(letters, k=draw.randint(1, 24)))
        assert ids(tokenizer, text) == own.encode_ordinary(text), repr(text)


# What a release gets


def released(source: Path, folder: Path) -> tuple[Path, PackRecord]:
    copy_block(source, "r", 0, "BF16", folder / "blocks/0.safetensors", folder / "blocks/0.json")
    pack(source, "r", "m", "BF16", folder / "blocks", folder / "model", folder / "pack.json")
    return folder / "model", read_json(folder / "pack.json", PackRecord)


@pytest.mark.parametrize("kind", ["kimi", "llama"])
def test_a_release_reads_text_as_its_source_was_read(kind, request, tmp_path):
    source = request.getfixturevalue(kind)
    model, record = released(source, tmp_path)
    assert record.tokenizer_from == {"kimi": "tiktoken.model", "llama": "tokenizer.model"}[kind]
    assert {"tokenizer.json", "tokenizer_config.json", record.tokenizer_from} <= record.files.keys()
    assert "tokenization_kimi.py" not in record.files and not list(model.glob("*.py"))
    own, theirs = tokenizer_of(Checkpoint(source)), AutoTokenizer.from_pretrained(model, trust_remote_code=False)
    for text in TEXTS:
        for framed in (True, False):
            assert own(text, add_special_tokens=framed) == theirs(text, add_special_tokens=framed)
    assert made_files(Checkpoint(model)) == {}, "it is as it has to be"
    assert "auto_map" not in json.loads((model / "tokenizer_config.json").read_text())
    mirror(source, [name for name in Checkpoint(source).files if not name.startswith("model")], tmp_path / "served")
    assert (tmp_path / "served/tokenizer.json").read_bytes() == (model / "tokenizer.json").read_bytes()


@pytest.mark.parametrize("kind", ["kimi", "llama"])
def test_it_is_the_same_file_every_time(kind, request):
    source = Checkpoint(request.getfixturevalue(kind))
    assert made_files(source) == made_files(source)


def test_sentencepieces_own_reading_is_kept(llama):
    own = sentencepiece.SentencePieceProcessor(model_file=str(llama / "tokenizer.model"))
    tokenizer = tokenizer_of(Checkpoint(llama))
    for text in TEXTS:
        if not text.startswith(" "):  # `legacy: false`: no second blank there
            assert ids(tokenizer, text) == own.encode(text), text
    assert tokenizer("the cat")["input_ids"] == [1, *own.encode("the cat")], "begun by <s>, as add_bos_token says"


@pytest.mark.parametrize(
    "config", [None, {}, {"tokenizer_class": "LLaMATokenizer"}, {"tokenizer_class": "LlamaTokenizer"}]
)
def test_a_tokenizer_model_needs_no_config_of_its_own(llama, tmp_path, config):
    """transformers itself would put no blank before the first word where it does not know the class."""
    source = shutil.copytree(llama, tmp_path / "m")
    (source / "tokenizer_config.json").unlink()
    if config is not None:
        (source / "tokenizer_config.json").write_text(json.dumps(config))
    own = sentencepiece.SentencePieceProcessor(model_file=str(llama / "tokenizer.model"))
    tokenizer = tokenizer_of(Checkpoint(source))
    assert [ids(tokenizer, text) for text in TEXTS] == own.encode(TEXTS)


def test_a_model_that_normalizes_and_has_no_bytes_is_read_as_sentencepiece_does(llama, tmp_path):
    """Not as Llama's: NFKC, blanks that are dropped, and one unknown token for what there is no piece for."""
    text = tiny.write_text(tmp_path / "text.txt")
    settings = {"vocab_size": 60, "model_type": "bpe", "hard_vocab_limit": False, "minloglevel": 2}
    sentencepiece.SentencePieceTrainer.train(input=str(text), model_prefix=str(tmp_path / "sp"), **settings)
    source = shutil.copytree(llama, tmp_path / "m")
    shutil.copy(tmp_path / "sp.model", source / "tokenizer.model")
    own = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "sp.model"))
    for config in ({"unk_token": "<unk>"}, {"unk_token": "<unk>", "legacy": False}):
        (source / "tokenizer_config.json").write_text(json.dumps(config))
        found = tokenizer_of(Checkpoint(source))
        for text in ("the cat sat", "The ball, 12 \u4e2d\u6587 dogs", "one\ntwo", "caf\u00e9"):
            assert ids(found, text) == own.encode(text), text
        assert 0 in ids(found, "The")


def test_a_sentencepiece_model_that_can_not_be_converted_is_refused(llama, tmp_path):
    text = tiny.write_text(tmp_path / "text.txt")
    settings = {"vocab_size": 90, "model_type": "unigram", "hard_vocab_limit": False, "minloglevel": 2}
    sentencepiece.SentencePieceTrainer.train(input=str(text), model_prefix=str(tmp_path / "sp"), **settings)
    source = shutil.copytree(llama, tmp_path / "m")
    shutil.copy(tmp_path / "sp.model", source / "tokenizer.model")
    with refused(tmp_path, f"{source}/tokenizer.model: ", "tokenizer.json beside it with the maker's code"):
        tokenizer_of(Checkpoint(source))
    (source / "tokenizer.model").write_bytes(b"IA== 0\nIQ== 1\n")
    with refused(tmp_path, f"{source}/tokenizer.model: ", "expected a sentencepiece model"):
        tokenizer_of(Checkpoint(source))


def test_code_that_a_tokenizer_json_does_not_need_is_dropped(kimi, tmp_path):
    """A repacking with tokenizer.json that still names the maker's code: engines would look for it, and not find it."""
    source = shutil.copytree(kimi, tmp_path / "m")
    (source / "tokenizer.json").write_text(made_files(Checkpoint(kimi))["tokenizer.json"])
    model, record = released(source, tmp_path)
    assert record.tokenizer_from is None
    told = json.loads((model / "tokenizer_config.json").read_text())
    assert "auto_map" not in told and told["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert told["model_max_length"] == 131072 and told["added_tokens_decoder"]["269"]["content"] == "[BOS]"
    theirs = AutoTokenizer.from_pretrained(model, trust_remote_code=False)
    assert [ids(theirs, text) for text in TEXTS] == [ids(tokenizer_of(Checkpoint(source)), text) for text in TEXTS]


def test_a_plain_tokenizer_goes_along_byte_for_byte(tmp_path):
    source = tiny.write_checkpoint(tmp_path / "m", "qwen3", num_hidden_layers=1)
    assert made_files(Checkpoint(source)) == {}
    model, _ = released(source, tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (model / name).read_bytes() == (source / name).read_bytes()


def test_calibration_reads_kimis_text_with_tokens_beyond_the_embedding_that_nothing_writes(source, tmp_path):
    """525 tokens and an embedding of 320: reserved ones are for later."""
    text = tiny.write_text(tmp_path / "text.txt", 400)
    settings = Calibration(sources=[{"path": str(text)}], nsamples=4, seqlen=32, heldout={"nsamples": 2})
    record = make_token_sets("m", source, "c", settings, tmp_path / "tokens", tmp_path / "c.json")
    assert record.calibration_set.samples == 4
    (tmp_path / "text.txt").write_text("\n\n".join(f"{line}<|reserved_token_400|>" for line in tiny.sentences(400, 0)))
    with refused(tmp_path, "the tokenizer gives token 400 for these texts; config.json has a vocabulary of 320"):
        make_token_sets("m", source, "c", settings, tmp_path / "other", tmp_path / "other.json")
    assert max(sample(tokenizer_of(Checkpoint(source)), 10_000)) < 269


def test_another_file_of_the_same_place_is_read_anew(kimi, tmp_path):
    """tiktoken keeps what it once read of a path under /tmp; a build must not be given that."""
    source = shutil.copytree(kimi, tmp_path / "m")
    first = ids(tokenizer_of(Checkpoint(source)), "the")
    write_kimi(source, BASE + [b"he", b"the", *WORDS[2:]])
    assert ids(tokenizer_of(Checkpoint(source)), "the") == [257] == first
    write_kimi(source, BASE + [b"he", b"hx", *WORDS[2:]])
    assert len(ids(tokenizer_of(Checkpoint(source)), "the")) == 2


# What is refused


@pytest.mark.parametrize(
    ("changes", "found"),
    [
        ({"tokenizer_class": "OtherTokenizer"}, "tokenizer_class 'OtherTokenizer' of 'kimi_k2'"),
        ({"tokenizer_class": None}, "tokenizer_class None of 'kimi_k2'"),
    ],
)
def test_a_tiktoken_file_of_unknown_code_is_refused_when_planned(source, tmp_path, changes, found):
    write_kimi(source, **changes)
    for check in (check_files, check_convertible, tokenizer_of):
        with refused(
            tmp_path, f"{source}: tiktoken.model and no tokenizer.json: {found} is code of its own", "save a tok"
        ):
            check(Checkpoint(source))


def test_kimis_code_of_another_family_is_refused(source, tmp_path):
    tiny.edit_config(source, model_type="deepseek_v3")
    with refused(tmp_path, "'TikTokenTokenizer' of 'deepseek_v3' is code of its own, which is not run; known: "):
        check_files(Checkpoint(source))


@pytest.mark.parametrize(
    ("damage", "line"),
    [
        (lambda source: (source / "tiktoken.model").write_text("!!!\n"), "tiktoken.model: Error parsing line"),
        (
            lambda source: write_kimi(source, BASE[1:]),
            "255 tokens found; expected ranks from 0 on, and one for each byte",
        ),
        (
            lambda source: edit_json(source / "tokenizer_config.json", lambda c: c.update(added_tokens_decoder=[1])),
            "added_tokens_decoder: [1]; expected tokens with their `content`, by id",
        ),
        (
            lambda source: edit_json(
                source / "tokenizer_config.json", lambda c: c["added_tokens_decoder"].update({"9000": {"content": "x"}})
            ),
            "added_tokens_decoder: 9000; expected tokens from 269 to 524",
        ),
        (
            lambda source: edit_json(
                source / "tokenizer_config.json",
                lambda c: c["added_tokens_decoder"].update({"271": {"content": "the"}}),
            ),
            "'the' became token 257; expected 271",
        ),
    ],
)
def test_a_broken_tiktoken_file_ends_in_one_line(source, tmp_path, damage, line):
    damage(source)
    with refused(tmp_path, line):
        tokenizer_of(Checkpoint(source))


def test_without_sentencepiece_it_is_said_so_when_planned(llama, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    line = (
        f"^{re.escape(str(llama))}: tokenizer.model and no tokenizer.json; expected one, or the package sentencepiece"
    )
    with pytest.raises(RequantError, match=line):
        check_files(Checkpoint(llama))


def test_half_a_vocabulary_is_refused_when_planned(tmp_path):
    source = tiny.write_checkpoint(tmp_path / "m", "llama", num_hidden_layers=1)
    (source / "tokenizer.json").unlink()
    (source / "vocab.json").write_text("{}")
    with refused(tmp_path, "vocab.json without merges.txt; expected both, or tokenizer.json"):
        check_files(Checkpoint(source))


def test_no_prompt_waits_for_an_answer(source, monkeypatch):
    """Code is neither run nor asked for: transformers would, on standard input."""
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked"))
    shutil.rmtree(source / "__pycache__", ignore_errors=True)
    tokenizer_of(Checkpoint(source))
    (source / "tiktoken.model").unlink()
    with pytest.raises(RequantError, match="no tokenizer.json, tokenizer.model, tiktoken.model or vocab.json"):
        tokenizer_of(Checkpoint(source))

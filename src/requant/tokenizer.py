"""The tokenizer of a checkpoint, and the files that a release gets where its source has them in another form.

A source without tokenizer.json, with `tokenizer.model` (sentencepiece) or `tiktoken.model` alone, is converted by
transformers. A tokenizer_config.json that names code of its own (`auto_map`) loses that: the code is not carried along.
The source is tokenized by exactly the files that its release will have, and no code of a checkpoint is run.

What a tiktoken file does not hold, how text is split before it and which tokens stand behind it, is code of its
maker's. It is known here for Kimi-K2.
"""

import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from requant.checkpoint import Checkpoint
from requant.errors import RequantError, brief, plain
from requant.records import write_text
from requant.untrusted import read_json_object

FAST, FAST_CONFIG = "tokenizer.json", "tokenizer_config.json"
GENERIC = "PreTrainedTokenizerFast"  # the class that reads tokenizer.json as it is, in transformers 4 and 5
CODE = ("auto_map",)  # keys that name code


@dataclass(frozen=True)
class Tiktoken:
    """What a maker's tokenizer does around its ranks. pattern: how text is split; reserved: tokens behind the ranks,
    `<|reserved_token_{id}|>` where tokenizer_config.json names none."""

    pattern: str
    reserved: int


# By (model_type, tokenizer_class of tokenizer_config.json). From moonshotai/Kimi-K2-Instruct's tokenization_kimi.py.
TIKTOKEN = {
    ("kimi_k2", "TikTokenTokenizer"): Tiktoken(
        pattern="|".join(
            (
                r"[\p{Han}]+",
                r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]*"
                r"[\p{Ll}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
                r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]+"
                r"[\p{Ll}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
                r"\p{N}{1,3}",
                r" ?[^\s\p{L}\p{N}]+[\r\n]*",
                r"\s*[\r\n]+",
                r"\s+(?!\S)",
                r"\s+",
            )
        ),
        reserved=256,
    )
}


# Texts that a converted tokenizer is held against sentencepiece on.
TRIED = (
    "The cat sat on the mat.",
    "  two blanks  before and  between",
    "don't, 3.14 and 2024\n\n\tnew lines",
    "caf\u00e9 na\u00efve \u4f60\u597d \u0434\u0430 \ud55c\uad6d \U0001f642",
    "x = [1, 2]; // {y}",
)


def tokenizer_of(checkpoint: Checkpoint) -> Any:
    """The transformers tokenizer of a checkpoint: of a source, that of its release.

    RequantError if its files are missing, no tokenizer can be made of them, or they need code of their own.
    """
    made = made_files(checkpoint)
    if not made:
        return _loaded(checkpoint.directory, "AutoTokenizer", checkpoint.directory)
    with tempfile.TemporaryDirectory() as folder:
        for name in checkpoint.tokenizer_files:
            shutil.copyfile(checkpoint.directory / name, Path(folder, name))
        write_made(made, Path(folder))
        return _loaded(folder, GENERIC, checkpoint.directory)


def write_made(made: dict[str, str], folder: Path) -> None:
    """Writes what `made_files` gave into `folder`; what is there under these names is replaced."""
    for name, text in made.items():
        write_text(folder / name, text)


def made_files(checkpoint: Checkpoint) -> dict[str, str]:
    """The text of each tokenizer file that a release has other than its source: none for one that is as it has to be.

    The same at every call. Raises RequantError as `tokenizer_of` does.
    """
    files, config = checkpoint.tokenizer_files, _config(checkpoint)
    if FAST in files:
        return {FAST_CONFIG: _text(_generic(config))} if any(key in config for key in CODE) else {}
    if "tiktoken.model" in files:
        check_tiktoken(checkpoint.config, config, str(checkpoint.directory))
        backend = _from_tiktoken(checkpoint, config)
    elif "tokenizer.model" in files:
        check_sentencepiece(str(checkpoint.directory))
        backend = _from_sentencepiece(checkpoint, config)
    elif "vocab.json" in files:
        return {}
    else:
        raise RequantError(
            f"{checkpoint.directory}: no tokenizer.json, tokenizer.model, tiktoken.model or vocab.json; expected one"
        )
    return {FAST: backend.to_str(pretty=True) + "\n", FAST_CONFIG: _text(_generic(config))}


def converted_from(checkpoint: Checkpoint) -> str | None:
    """The file that a release's tokenizer.json is made from; None if the source has one, or needs none."""
    files = checkpoint.tokenizer_files
    return next((name for name in ("tiktoken.model", "tokenizer.model") if name in files and FAST not in files), None)


def check_convertible(checkpoint: Checkpoint) -> None:
    """Raises RequantError if it is known before a tokenizer is loaded that none can be made of these files.

    A checkpoint without any is none of its matter.
    """
    files, where = set(checkpoint.tokenizer_files), str(checkpoint.directory)
    if FAST in files:
        return
    if "tiktoken.model" in files:
        check_tiktoken(checkpoint.config, _config(checkpoint), where)
    elif "tokenizer.model" in files:
        check_sentencepiece(where)
    elif "vocab.json" in files and "merges.txt" not in files:
        raise RequantError(f"{where}: vocab.json without merges.txt; expected both, or tokenizer.json")


def check_sentencepiece(where: str) -> None:
    """Raises RequantError if a tokenizer.model can't be read here."""
    from importlib.util import find_spec

    if find_spec("sentencepiece") is None:
        raise RequantError(
            f"{where}: tokenizer.model and no tokenizer.json; expected one, or the package sentencepiece, which "
            "transformers converts it with"
        )


def check_tiktoken(config: dict[str, Any], tokenizer_config: dict[str, Any], where: str) -> None:
    """Raises RequantError unless it is known how the maker of this model splits text before its tiktoken.model.

    config: of config.json; tokenizer_config: of tokenizer_config.json.
    """
    found = (config.get("model_type"), tokenizer_config.get("tokenizer_class"))
    if found not in TIKTOKEN:
        known = ", ".join(f"{name} of {model_type}" for model_type, name in TIKTOKEN)
        raise RequantError(
            f"{where}: tiktoken.model and no tokenizer.json: tokenizer_class {brief(found[1])} of {brief(found[0])} is "
            f"code of its own, which is not run; known: {known}; save a tokenizer.json beside it with the maker's code"
        )


def _config(checkpoint: Checkpoint) -> dict[str, Any]:
    path = checkpoint.directory / FAST_CONFIG
    return read_json_object(path) if path.exists() else {}


def _generic(config: dict[str, Any]) -> dict[str, Any]:
    """A tokenizer_config.json for a tokenizer.json that is read as it is."""
    return {key: value for key, value in config.items() if key not in CODE} | {"tokenizer_class": GENERIC}


def _text(config: dict[str, Any]) -> str:
    return json.dumps(config, indent=2, sort_keys=True, ensure_ascii=False) + "\n"


def _from_sentencepiece(checkpoint: Checkpoint, config: dict[str, Any]) -> Any:
    """The `tokenizers.Tokenizer` of a sentencepiece model, which reads text as sentencepiece does.

    transformers 5 takes the pieces over. It leaves out the model's own normalization, drops characters that there is no
    piece for, and for a class that it does not know puts no blank before the first word. `legacy: false` in
    tokenizer_config.json asks for its way with blanks: one before text that begins with none, none behind special
    tokens.
    """
    import sentencepiece

    path = checkpoint.directory / "tokenizer.model"
    try:
        model = sentencepiece.SentencePieceProcessor(model_file=str(path))
    except Exception as error:  # RuntimeError, OSError and TypeError are known
        raise RequantError(f"{path}: {plain(error)}; expected a sentencepiece model") from None
    backend = _loaded(checkpoint.directory, "LlamaTokenizer", checkpoint.directory).backend_tokenizer
    if model.unk_id() >= 0:
        backend.model.unk_token = model.id_to_piece(model.unk_id())
    legacy = bool(config.get("legacy", True))
    backend.normalizer = _normalizer(path, legacy)
    if legacy:
        backend.pre_tokenizer = None
    for text in TRIED if legacy else (text for text in TRIED if not text.startswith(" ")):
        found, wanted = backend.encode(text, add_special_tokens=False).ids, model.encode(text)
        if found != wanted:
            raise RequantError(
                f"{path}: converted, {brief(text)} is {brief(found)}; sentencepiece reads {brief(wanted)}: save a "
                "tokenizer.json beside it with the maker's code"
            )
    return backend


def _normalizer(path: Path, blanks: bool) -> Any:
    """What a sentencepiece model does to text before it looks for pieces; to its blanks only if asked for."""
    from tokenizers import Regex, normalizers
    from transformers.convert_slow_tokenizer import import_protobuf

    proto = import_protobuf().ModelProto()
    proto.ParseFromString(path.read_bytes())
    spec, parts = proto.normalizer_spec, []
    if spec.precompiled_charsmap:
        parts.append(normalizers.Precompiled(spec.precompiled_charsmap))
    if spec.remove_extra_whitespaces:
        parts += [normalizers.Strip(), normalizers.Replace(Regex(" {2,}"), " ")]
    if blanks and spec.add_dummy_prefix:
        parts.append(normalizers.Prepend("▁"))
    if blanks:
        parts.append(normalizers.Replace(" ", "▁"))
    return normalizers.Sequence(parts)


def _from_tiktoken(checkpoint: Checkpoint, config: dict[str, Any]) -> Any:
    """The `tokenizers.Tokenizer` of a tiktoken.model whose maker's code is known."""
    from tokenizers import AddedToken
    from transformers.convert_slow_tokenizer import TikTokenConverter

    known = TIKTOKEN[checkpoint.config["model_type"], config["tokenizer_class"]]
    path = checkpoint.directory / "tiktoken.model"
    with _uncached():
        try:
            ranks = TikTokenConverter.load_tiktoken_bpe(str(path))
            backend = TikTokenConverter(str(path), pattern=known.pattern).converted()
        except Exception as error:  # tiktoken and tokenizers raise of many kinds
            raise RequantError(f"{path}: {plain(error)}; expected a token in base64 and its rank a line") from error
    count = len(ranks)
    if sorted(ranks.values()) != list(range(count)) or any(bytes([value]) not in ranks for value in range(256)):
        raise RequantError(f"{path}: {count} tokens found; expected ranks from 0 on, and one for each byte")
    named = _named(config, str(checkpoint.directory / FAST_CONFIG))
    tokens = []
    for token in range(count, count + known.reserved):
        entry = {"content": f"<|reserved_token_{token}|>"} | named.pop(token, {})
        flags = {key: bool(entry.get(key)) for key in ("lstrip", "rstrip", "single_word", "normalized")}
        tokens.append(AddedToken(entry["content"], special=bool(entry.get("special", True)), **flags))
    if named:
        raise RequantError(
            f"{checkpoint.directory / FAST_CONFIG}: added_tokens_decoder: {min(named)}; expected tokens from {count} "
            f"to {count + known.reserved - 1}, behind those of tiktoken.model"
        )
    backend.add_tokens(tokens)
    for number, token in enumerate(tokens, count):
        if backend.token_to_id(token.content) != number:
            raise RequantError(
                f"{path}: {brief(token.content)} became token {backend.token_to_id(token.content)}; expected {number}"
            )
    return backend


def _named(config: dict[str, Any], where: str) -> dict[int, dict[str, Any]]:
    """The tokens that tokenizer_config.json names, by id."""
    found = config.get("added_tokens_decoder") or {}
    wrong = RequantError(f"{where}: added_tokens_decoder: {brief(found)}; expected tokens with their `content`, by id")
    if not isinstance(found, dict):
        raise wrong
    named = {}
    for key, entry in found.items():
        if not (key.isdecimal() and isinstance(entry, dict) and isinstance(entry.get("content"), str)):
            raise wrong
        named[int(key)] = entry
    return named


def _loaded(folder: str | Path, kind: str, shown: Path) -> Any:
    """The tokenizer that transformers' class `kind` makes of the files in `folder`; `shown` is named in errors."""
    import transformers

    with _uncached():
        try:
            return getattr(transformers, kind).from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        except Exception as error:  # the tokenizers library raises bare Exceptions
            raise RequantError(f"{shown}: no tokenizer can be made of its files: {plain(error)}") from error


@contextlib.contextmanager
def _uncached() -> Iterator[None]:
    """tiktoken reads the file that it is given: else it takes, for the same path, one that it once put under /tmp."""
    before = os.environ.get("TIKTOKEN_CACHE_DIR")
    os.environ["TIKTOKEN_CACHE_DIR"] = ""
    try:
        yield
    finally:
        if before is None:
            del os.environ["TIKTOKEN_CACHE_DIR"]
        else:
            os.environ["TIKTOKEN_CACHE_DIR"] = before

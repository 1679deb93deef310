"""The vocabulary in a GGUF file as a tokenizer.json.

GGUF holds tokens, merges and the *name* of a pre-tokenizer; what a name means stands in llama.cpp's code alone. The names that
are known here have been compared with the tokenizers that they were made from; any other is refused.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from edgekv.errors import CheckpointError
from edgekv.schema import shown

from ..tokenizer import TokenizerFiles
from .file import GgufFile

# What tokens are. Source: llama.h, llama_token_type.
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = range(1, 7)
_LLAMA3 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_QWEN2 = _LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
_BOUNDARY = "\N{LOWER ONE EIGHTH BLOCK}"  # what SentencePiece writes for a space
_NAMED = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}


def read_gguf_tokenizer(file: GgufFile, vocab_size: int) -> TokenizerFiles:
    """Build the tokenizer.

    Args:
        vocab_size: rows of the embedding.

    Raises:
        CheckpointError: the vocabulary is damaged, larger than the embedding, or of a kind that is not known here.
    """
    kind = file.get("tokenizer.ggml.model", str)
    tokens = _strings(file, "tokenizer.ggml.tokens")
    if len(tokens) > vocab_size or len(set(tokens)) != len(tokens):
        raise CheckpointError(
            f"{file.path}: {len(tokens)} tokens ({len(set(tokens))} distinct) for {vocab_size} rows of the embedding;"
            " convert the model to GGUF again"
        )
    types = file.get("tokenizer.ggml.token_type", list, [_NORMAL] * len(tokens))
    if len(types) != len(tokens):
        raise CheckpointError(f"{file.path}: tokens and their types differ in number; convert the model to GGUF again")
    try:
        if kind == "gpt2":
            tokenizer, begins = _byte_level(file, tokens)
        elif kind == "llama":
            tokenizer, begins = _sentencepiece(file, tokens), True
        else:
            raise CheckpointError(
                f"{file.path}: a tokenizer of the kind {shown(kind)} is not known; edgekv reads gpt2 and llama"
            )
        added = [
            (token, what)
            for token, what in zip(tokens, types, strict=True)
            if what in (_CONTROL, _USER_DEFINED, _UNKNOWN)
        ]
        tokenizer.add_tokens(
            [AddedToken(token, normalized=False, special=what != _USER_DEFINED) for token, what in added]
        )
        special = {
            name: tokens[number] for name, key in _NAMED.items() if (number := _id(file, key, len(tokens))) is not None
        }
        _frame(file, tokenizer, special, begins=begins)
        text = tokenizer.to_str()
    except CheckpointError:
        raise
    except Exception as error:  # tokenizers raises bare Exception
        raise CheckpointError(
            f"{file.path}: the vocabulary makes no tokenizer ({error}); convert the model to GGUF again"
        ) from error
    template = file.metadata.get("tokenizer.chat_template")
    return TokenizerFiles(
        json=text,
        special_tokens=special,
        chat_template=template if isinstance(template, str) else None,
        bos_token_id=_id(file, "bos", len(tokens)),
        eos_token_id=_id(file, "eos", len(tokens)),
    )


def _strings(file: GgufFile, key: str) -> list[str]:
    values = file.get(key, list)
    if not all(isinstance(value, str) for value in values):
        raise CheckpointError(f"{file.path}: {key} does not hold texts; convert the model to GGUF again")
    return list(values)


def _id(file: GgufFile, name: str, count: int) -> int | None:
    key = f"tokenizer.ggml.{name}_token_id"
    number = file.metadata.get(key)
    if number is None:
        return None
    if not isinstance(number, int) or not 0 <= number < count:
        raise CheckpointError(
            f"{file.path}: {key} is {shown(number)}, and there are {count} tokens; convert the model to GGUF again"
        )
    return number


def _byte_level(file: GgufFile, tokens: Sequence[str]) -> tuple[Tokenizer, bool]:
    """Return a byte-level BPE, and whether its texts begin with the first token unless the file says otherwise."""
    name = file.get("tokenizer.ggml.pre", str, "default")
    splits = _SPLITS.get(name)
    if splits is None:
        raise CheckpointError(
            f"{file.path}: the pre-tokenizer {shown(name)} is not known; edgekv reads {', '.join(_SPLITS)}; export the model from"
            " its Hugging Face checkpoint"
        )
    merges = []
    for merge in _strings(file, "tokenizer.ggml.merges"):
        left, _, right = merge.partition(" ")
        if not left or not right or " " in right:
            raise CheckpointError(
                f"{file.path}: {shown(merge)} is no merge of two tokens; convert the model to GGUF again"
            )
        merges.append((left, right))
    llama3 = name in _LLAMA3_NAMES
    vocabulary = {token: number for number, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, fuse_unk=False, ignore_merges=llama3))
    if splits == _QWEN2:
        tokenizer.normalizer = normalizers.NFC()
    steps: list[Any] = [pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=splits in ("", _DIGITS))]
    if splits == _DIGITS:
        steps.insert(0, pre_tokenizers.Digits(individual_digits=True))
    elif splits:
        steps.insert(0, pre_tokenizers.Split(Regex(splits), "isolated"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer, llama3


_DIGITS = "digits"
_LLAMA3_NAMES = ("llama3", "llama-v3", "llama-bpe")
#: What text is cut at before merging, by the name of the pre-tokenizer; "": as GPT-2 does. Source: llama.cpp, llama-vocab.cpp.
_SPLITS = {
    "gpt-2": "",
    "smollm": _DIGITS,
    "qwen2": _QWEN2,
    "deepseek-r1-qwen": _QWEN2,
    **dict.fromkeys(_LLAMA3_NAMES, _LLAMA3),
}


def _sentencepiece(file: GgufFile, tokens: Sequence[str]) -> Tokenizer:
    """Return a SentencePiece BPE: pieces that score higher are merged first."""
    scores = file.get("tokenizer.ggml.scores", list)
    if len(scores) != len(tokens):
        raise CheckpointError(f"{file.path}: tokens and their scores differ in number; convert the model to GGUF again")
    rank = {token: (-score, number) for number, (token, score) in enumerate(zip(tokens, scores, strict=True))}
    cuts = [(piece[:at], piece[at:]) for piece in tokens for at in range(1, len(piece))]
    merges = sorted(
        (cut for cut in cuts if cut[0] in rank and cut[1] in rank),
        key=lambda cut: (rank[cut[0] + cut[1]], rank[cut[0]][1], rank[cut[1]][1]),
    )
    unknown = _id(file, "unknown", len(tokens))
    vocabulary = {token: number for number, token in enumerate(tokens)}
    model = models.BPE(
        vocab=vocabulary,
        merges=merges,
        unk_token=None if unknown is None else tokens[unknown],
        fuse_unk=True,
        byte_fallback=True,
    )
    tokenizer = Tokenizer(model)
    prefixed = file.get("tokenizer.ggml.add_space_prefix", bool, True)
    steps: list[Any] = [normalizers.Replace(" ", _BOUNDARY)]
    ends: list[Any] = [decoders.Replace(_BOUNDARY, " "), decoders.ByteFallback(), decoders.Fuse()]
    if prefixed:
        steps.insert(0, normalizers.Prepend(_BOUNDARY))
        ends.append(decoders.Strip(" ", 1, 0))
    tokenizer.normalizer, tokenizer.decoder = normalizers.Sequence(steps), decoders.Sequence(ends)
    return tokenizer


def _frame(file: GgufFile, tokenizer: Tokenizer, special: dict[str, str], *, begins: bool) -> None:
    """Put the first and the last token around each text, where the file says so."""
    first = file.get("tokenizer.ggml.add_bos_token", bool, begins)
    last = file.get("tokenizer.ggml.add_eos_token", bool, False)
    around = [name for name, wanted in (("bos_token", first), ("eos_token", last)) if wanted and name in special]
    if not around:
        return
    pieces = [special[name] if name in around else None for name in ("bos_token", "eos_token")]
    single = [part for part in (pieces[0], "$A", pieces[1]) if part is not None]
    pairs = [(special[name], tokenizer.token_to_id(special[name])) for name in around]
    tokenizer.post_processor = processors.TemplateProcessing(single=single, special_tokens=pairs)

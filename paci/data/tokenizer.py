"""Tokenizers: single bytes, or byte-level BPE trained on the corpus.

Specs are ``bytes`` and ``bpe:SIZE``. Tokens fit 16 bits; the last one marks the end of a document.
The letters ``<|endoftext|>`` in a text are encoded as letters, never as that token.
"""

import json
import logging
import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Final, final

import numpy as np
import numpy.typing as npt
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from paci.errors import DataError

TOKENIZER_FILE = "tokenizer.json"
NUM_BYTES = 256
MIN_BPE_SIZE = NUM_BYTES + 1
MAX_BPE_SIZE = 65535

END_OF_TEXT: Final = "<|endoftext|>"
_BYTES_CONTENT = {"kind": "bytes"}
# The library keeps some hundred bytes for each token of one call, so long texts go in pieces.
_PIECE_CHARS = 1 << 20
_SAFE_CUT = re.compile(r"\S(?=\n)")

_logger = logging.getLogger(__name__)


class Tokenizer(ABC):
    """Turns text into tokens ``0 .. vocab_size - 1`` and back.

    Attributes:
        vocab_size: number of tokens, ``end_of_text`` included; at most 65535.
        end_of_text: the token that follows every document.
    """

    vocab_size: int
    end_of_text: int

    @abstractmethod
    def encode(self, text: str) -> npt.NDArray[np.uint16]:
        """Return the tokens of a text, uint16 [num_tokens], without an end-of-text token.

        Lone surrogates, which no UTF-8 can hold, become question marks.
        """

    @abstractmethod
    def decode(self, tokens: Sequence[int] | npt.NDArray[np.integer[Any]]) -> str:
        """Return the text of tokens [num_tokens]; broken UTF-8 becomes U+FFFD.

        The end-of-text token becomes ``<|endoftext|>``.

        Raises:
            DataError: a token is not in ``[0, vocab_size)``.
        """

    @abstractmethod
    def save(self, folder: Path) -> None:
        """Write ``tokenizer.json`` into an existing folder, for `load_tokenizer`."""


@final
class ByteTokenizer(Tokenizer):
    """One token per byte of UTF-8: 256 bytes and the end of text."""

    vocab_size = NUM_BYTES + 1
    end_of_text = NUM_BYTES

    def encode(self, text: str) -> npt.NDArray[np.uint16]:
        """See `Tokenizer.encode`."""
        return np.frombuffer(text.encode("utf-8", "replace"), dtype=np.uint8).astype(np.uint16)

    def decode(self, tokens: Sequence[int] | npt.NDArray[np.integer[Any]]) -> str:
        """See `Tokenizer.decode`."""
        values = _checked(tokens, self.vocab_size)
        parts = np.split(values, np.flatnonzero(values == self.end_of_text))
        return END_OF_TEXT.join(
            part[part < NUM_BYTES].astype(np.uint8).tobytes().decode("utf-8", "replace")
            for part in parts
        )

    def save(self, folder: Path) -> None:
        """See `Tokenizer.save`."""
        (folder / TOKENIZER_FILE).write_text(json.dumps(_BYTES_CONTENT) + "\n", encoding="utf-8")


@final
class BpeTokenizer(Tokenizer):
    """Byte-level byte-pair encoding with GPT-2's way of cutting text into words.

    ``tokenizer.json`` is a file of the ``tokenizers`` library and can be used with it alone.

    Args:
        backend: a ``tokenizers.Tokenizer`` that knows ``<|endoftext|>``; `train` makes one.
    """

    def __init__(self, backend: tokenizers.Tokenizer) -> None:
        end_of_text = backend.token_to_id(END_OF_TEXT)
        vocab_size = backend.get_vocab_size()
        if end_of_text is None or vocab_size > MAX_BPE_SIZE:
            raise DataError(
                f"a BPE tokenizer must have {END_OF_TEXT!r} and at most {MAX_BPE_SIZE} tokens, "
                f"got {end_of_text} and {vocab_size}; train one with the spec 'bpe:SIZE'"
            )
        self.vocab_size = vocab_size
        self.end_of_text = end_of_text
        self._backend = backend
        # Not kept in the file. Without it a document could forge the end of another.
        self._backend.encode_special_tokens = True

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int) -> "BpeTokenizer":
        """Learn ``vocab_size`` tokens from texts; the same texts give the same tokens.

        If the texts have too little to merge, there are fewer tokens.

        Raises:
            DataError: ``vocab_size`` is not in ``[257, 65535]``.
        """
        if not MIN_BPE_SIZE <= vocab_size <= MAX_BPE_SIZE:
            raise DataError(
                f"a BPE vocabulary must have {MIN_BPE_SIZE} to {MAX_BPE_SIZE} tokens, "
                f"got {vocab_size}; choose a size in between, such as 'bpe:8192'"
            )
        backend = tokenizers.Tokenizer(models.BPE())
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size - 1,
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
            show_progress=False,
        )
        pieces = (piece for text in texts for piece in _pieces(text))
        backend.train_from_iterator(pieces, trainer)
        backend.add_special_tokens([END_OF_TEXT])
        tokenizer = cls(backend)
        if tokenizer.vocab_size < vocab_size:
            _logger.info("the corpus has %d of %d tokens", tokenizer.vocab_size, vocab_size)
        return tokenizer

    def encode(self, text: str) -> npt.NDArray[np.uint16]:
        """See `Tokenizer.encode`."""
        tokens = [
            np.asarray(self._backend.encode(piece, add_special_tokens=False).ids, dtype=np.uint16)
            for piece in _pieces(text)
        ]
        return np.concatenate(tokens)

    def decode(self, tokens: Sequence[int] | npt.NDArray[np.integer[Any]]) -> str:
        """See `Tokenizer.decode`."""
        values = _checked(tokens, self.vocab_size)
        return str(self._backend.decode(values.tolist(), skip_special_tokens=False))

    def save(self, folder: Path) -> None:
        """See `Tokenizer.save`."""
        (folder / TOKENIZER_FILE).write_text(self._backend.to_str() + "\n", encoding="utf-8")


def check_tokenizer_spec(spec: str) -> int | None:
    """Return the size that ``bpe:SIZE`` asks for, None for ``bytes``.

    Raises:
        DataError: the spec has neither form, or the size is not in ``[257, 65535]``.
    """
    if spec == "bytes":
        return None
    kind, _, size = spec.partition(":")
    is_number = size.isascii() and size.isdecimal()
    if kind != "bpe" or not is_number or not MIN_BPE_SIZE <= int(size) <= MAX_BPE_SIZE:
        raise DataError(
            f"a tokenizer must be 'bytes' or 'bpe:SIZE' with a SIZE of {MIN_BPE_SIZE} to "
            f"{MAX_BPE_SIZE}, got {spec!r}; use 'bytes' or, for example, 'bpe:8192'"
        )
    return int(size)


def tokenizer_spec(vocab_size: int) -> str | None:
    """Return the spec of a tokenizer with ``vocab_size`` tokens, or None if there is none."""
    if vocab_size == ByteTokenizer.vocab_size:
        return "bytes"
    return f"bpe:{vocab_size}" if MIN_BPE_SIZE <= vocab_size <= MAX_BPE_SIZE else None


def build_tokenizer(spec: str, texts: Iterable[str]) -> Tokenizer:
    """Make the tokenizer of a spec, ``bytes`` or ``bpe:SIZE``.

    Args:
        spec: as for `check_tokenizer_spec`.
        texts: texts to train BPE on; not read for ``bytes``.

    Raises:
        DataError: the spec is not valid.
    """
    vocab_size = check_tokenizer_spec(spec)
    return ByteTokenizer() if vocab_size is None else BpeTokenizer.train(texts, vocab_size)


def load_tokenizer(folder: Path | str) -> Tokenizer:
    """Read the tokenizer that `Tokenizer.save` wrote into a folder.

    Raises:
        DataError: there is no ``tokenizer.json`` in the folder, or it is damaged.
    """
    path = Path(folder) / TOKENIZER_FILE
    try:
        content = path.read_text(encoding="utf-8")
        if json.loads(content) == _BYTES_CONTENT:
            return ByteTokenizer()
        return BpeTokenizer(tokenizers.Tokenizer.from_str(content))
    except Exception as error:  # the library raises a bare Exception for a damaged file
        reason = " ".join(str(error).split())
        raise DataError(
            f"a tokenizer must be readable, got {type(error).__name__}: {reason} "
            f"for {str(path)!r}; prepare the corpus again"
        ) from error


def _checked(
    tokens: Sequence[int] | npt.NDArray[np.integer[Any]], vocab_size: int
) -> npt.NDArray[np.int64]:
    values = np.asarray(tokens, dtype=np.int64)
    outside = values[(values < 0) | (values >= vocab_size)]
    if outside.size:
        raise DataError(
            f"tokens must be in [0, {vocab_size}), got {int(outside[0])}; "
            f"decode with the tokenizer that encoded"
        )
    return values


def _pieces(text: str) -> Iterator[str]:
    """Cut a long text into pieces where this does not change its tokens.

    No word of GPT-2's pattern spans a line end and the non-space before it: a run of white space
    starts a new word at its first character unless that is a space.
    """
    text = text.encode("utf-8", "replace").decode("utf-8")
    start = 0
    while cut := _SAFE_CUT.search(text, start + _PIECE_CHARS):
        yield text[start : cut.end()]
        start = cut.end()
    yield text[start:]

"""A tokenized corpus on disk: written whole, renamed into place, mapped into memory.

::

    <folder>/train.bin        uint16, little-endian; each document, then end-of-text
             val.bin          the same
             tokenizer.json
             meta.json        counts, specs, versions, sha256 of the other three
"""

import contextlib
import hashlib
import json
import math
import os
import shutil
import uuid
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from paci.data.tokenizer import TOKENIZER_FILE, Tokenizer, load_tokenizer

FORMAT_VERSION = 1
TRAIN_FILE = "train.bin"
VAL_FILE = "val.bin"
META_FILE = "meta.json"

_DTYPE = np.dtype("<u2")
_TOKENS_PER_COUNT = 1 << 22


@dataclass(frozen=True, eq=False)
class Corpus:
    """A tokenized corpus, mapped into memory.

    Attributes:
        folder: the folder that holds its files.
        tokenizer: the tokenizer that made the tokens.
        train: uint16 [num_train_tokens], read-only.
        val: uint16 [num_val_tokens], read-only.
        digest: hexadecimal digest of all tokens; equal on two hosts if they hold the same ones.
    """

    folder: Path
    tokenizer: Tokenizer
    train: np.memmap[Any, np.dtype[np.uint16]]
    val: np.memmap[Any, np.dtype[np.uint16]]
    digest: str

    def unigram_perplexity(self) -> float:
        """Return the validation perplexity of token frequencies alone, a baseline for models.

        ``exp(-mean over val of ln p(token))`` with add-one smoothing over ``train``,
        ``p(token) = (count(token) + 1) / (num_train_tokens + vocab_size)``.
        """
        vocab_size = self.tokenizer.vocab_size
        log_p = np.log(_token_counts(self.train, vocab_size) + 1)
        log_p -= math.log(len(self.train) + vocab_size)
        return math.exp(-float(_token_counts(self.val, vocab_size) @ log_p) / len(self.val))


def write_corpus(
    folder: Path,
    parts: Iterable[tuple[bool, str]],
    tokenizer: Tokenizer,
    facts: Mapping[str, Any],
) -> None:
    """Tokenize texts into the files of an existing folder, one text in memory at a time.

    Args:
        folder: an empty folder.
        parts: ``(is validation, text)`` pairs; the end-of-text token is written after each text.
        tokenizer: the tokenizer to use; it is saved into the folder.
        facts: further entries of ``meta.json``.
    """
    tokenizer.save(folder)
    with (folder / TRAIN_FILE).open("wb") as train, (folder / VAL_FILE).open("wb") as val:
        sides = {False: _TokenFile(train), True: _TokenFile(val)}
        for is_val, text in parts:
            sides[is_val].append(tokenizer.encode(text), tokenizer.end_of_text)
    files = {TRAIN_FILE: sides[False], VAL_FILE: sides[True]}
    sha256 = {name: file.hash.hexdigest() for name, file in files.items()}
    meta = {
        "format_version": FORMAT_VERSION,
        **facts,
        "vocab_size": tokenizer.vocab_size,
        "end_of_text": tokenizer.end_of_text,
        "num_documents": {name: file.num_documents for name, file in files.items()},
        "num_tokens": {name: file.num_tokens for name, file in files.items()},
        "sha256": {**sha256, TOKENIZER_FILE: _sha256(folder / TOKENIZER_FILE)},
    }
    (folder / META_FILE).write_text(json.dumps(meta, indent=2) + "\n", encoding="utf-8")


def open_corpus(folder: Path) -> Corpus | None:
    """Return the corpus in a folder, or None if there is none or it is damaged.

    The sizes of the token files and the content of the tokenizer file are compared with
    ``meta.json``; reading all tokens on every start would cost too much.
    """
    try:
        meta = json.loads((folder / META_FILE).read_text(encoding="utf-8"))
        num_tokens, sha256 = meta["num_tokens"], meta["sha256"]
        for name in (TRAIN_FILE, VAL_FILE):
            if (folder / name).stat().st_size != num_tokens[name] * _DTYPE.itemsize:
                return None
        if _sha256(folder / TOKENIZER_FILE) != sha256[TOKENIZER_FILE]:
            return None
        return Corpus(
            folder=folder,
            tokenizer=load_tokenizer(folder),
            train=np.memmap(folder / TRAIN_FILE, dtype=_DTYPE, mode="r"),
            val=np.memmap(folder / VAL_FILE, dtype=_DTYPE, mode="r"),
            digest=hashlib.sha256(f"{sha256[TRAIN_FILE]} {sha256[VAL_FILE]}".encode()).hexdigest(),
        )
    except (OSError, ValueError, LookupError, TypeError):
        return None


def sibling(folder: Path) -> Path:
    """Return a path for a new folder beside ``folder`` that no other process uses."""
    return folder.with_name(f".{folder.name}.{uuid.uuid4().hex}")


def install(new_folder: Path, folder: Path) -> None:
    """Move a complete new folder to its place; delete it if a sound one is there already.

    If several processes do this, the first wins. A damaged folder in the place is deleted first.
    If that deletes a sound folder which another process has just put there, the new folder has the
    same content. The caller must open the result, and try again if that fails.
    """
    try:
        if _rename(new_folder, folder) or open_corpus(folder) is not None:
            return
        aside = sibling(folder)
        with contextlib.suppress(FileNotFoundError):
            os.rename(folder, aside)
        shutil.rmtree(aside, ignore_errors=True)
        _rename(new_folder, folder)
    finally:
        shutil.rmtree(new_folder, ignore_errors=True)


class _TokenFile:
    """Appends documents to an open file, and counts and hashes what it writes."""

    def __init__(self, file: BinaryIO) -> None:
        self.hash = hashlib.sha256()
        self.num_documents = 0
        self.num_tokens = 0
        self._file = file

    def append(self, tokens: npt.NDArray[np.uint16], end_of_text: int) -> None:
        content = np.append(tokens, np.uint16(end_of_text)).astype(_DTYPE).tobytes()
        self._file.write(content)
        self.hash.update(content)
        self.num_documents += 1
        self.num_tokens += len(tokens) + 1


def _rename(source: Path, target: Path) -> bool:
    """Rename a folder unless the target exists; return whether it was renamed.

    An empty folder may be replaced.
    """
    try:
        os.rename(source, target)
    except OSError:
        if not target.exists():
            raise
        return False
    return True


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _token_counts(tokens: npt.NDArray[np.uint16], vocab_size: int) -> npt.NDArray[np.int64]:
    """Count each token, int64 [vocab_size]; in pieces, since bincount converts its input."""
    counts = np.zeros(vocab_size, dtype=np.int64)
    for start in range(0, len(tokens), _TOKENS_PER_COUNT):
        counts += np.bincount(tokens[start : start + _TOKENS_PER_COUNT], minlength=vocab_size)
    return counts

"""What the tests of data share."""

from pathlib import Path

import numpy as np
import pytest

from paci.data import ByteTokenizer, Corpus
from paci.errors import DataError


def write_folder(path: Path, num_files: int) -> Path:
    path.mkdir()
    for i in range(num_files):
        (path / f"{i:03}.txt").write_text(f"document {i} " + "the cat sat on the mat. " * (i % 7))
    return path


def assert_one_line(error: pytest.ExceptionInfo[DataError]) -> None:
    message = str(error.value)
    assert "\n" not in message
    assert ", got " in message
    assert "; " in message.split(", got ", 1)[1]


def split_text(corpus: Corpus) -> tuple[list[str], list[str]]:
    """Both sides of a corpus as texts of documents."""

    def cut(tokens: np.ndarray) -> list[str]:
        ends = np.flatnonzero(tokens == corpus.tokenizer.end_of_text)
        assert ends[-1] == len(tokens) - 1
        return [corpus.tokenizer.decode(part[part < 256]) for part in np.split(tokens, ends + 1)]

    assert isinstance(corpus.tokenizer, ByteTokenizer)
    return cut(corpus.train)[:-1], cut(corpus.val)[:-1]

"""Text from Hugging Face datasets, on the Hub or in a local folder (optional extra)."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from paci.errors import DataError

PREFIX = "hf:"

# A split may be a slice such as train[:1%], with colons of its own.
_FORM = re.compile(r"hf:([^:]+)(?::([^:\[\]]+(?:\[[^\]]*\])?)(?::(.+))?)?")
_ROWS_PER_READ = 256


@dataclass(frozen=True)
class HuggingFaceSource:
    """A text column of one split of a dataset; ``name`` may be a local folder."""

    name: str
    split: str
    column: str


def parse(spec: str) -> HuggingFaceSource:
    """Read ``hf:NAME_OR_PATH[:SPLIT[:COLUMN]]``; split "train" and column "text" by default.

    Raises:
        DataError: the spec does not have this form.
    """
    match = _FORM.fullmatch(spec)
    if match is None:
        raise DataError(
            f"a Hugging Face corpus must be 'hf:NAME_OR_PATH[:SPLIT[:COLUMN]]', got {spec!r}; "
            f"for example 'hf:Skylion007/openwebtext:train:text'"
        )
    return HuggingFaceSource(match[1], match[2] or "train", match[3] or "text")


def read_texts(source: HuggingFaceSource) -> Iterator[str]:
    """Load a dataset and return the text of every row that has one, in the dataset's order.

    Raises:
        DataError: ``datasets`` is not installed, the dataset cannot be reached or loaded, or it
            has no such split or text column.
    """
    dataset = _load(source)
    columns = list(dataset.column_names)
    if source.column not in columns:
        raise DataError(
            f"the column must be one of {columns} for {source.name!r}, got {source.column!r}; "
            f"name it as 'hf:{source.name}:{source.split}:COLUMN'"
        )
    return _rows(dataset.select_columns([source.column]), source, columns)


def _rows(dataset: Any, source: HuggingFaceSource, columns: list[str]) -> Iterator[str]:
    for rows in dataset.iter(batch_size=_ROWS_PER_READ):
        for text in rows[source.column]:
            if text is None:
                continue
            if not isinstance(text, str):
                raise DataError(
                    f"the column {source.column!r} of {source.name!r} must hold text, "
                    f"got {type(text).__name__}; name another of {columns}"
                )
            yield text


def _load(source: HuggingFaceSource) -> Any:
    try:
        import datasets
    except ImportError as error:
        raise DataError(
            f"an 'hf:' corpus needs the package 'datasets', got {source.name!r} without it; "
            f"run: pip install 'paci-pipeline[datasets]'"
        ) from error
    try:
        return datasets.load_dataset(source.name, split=source.split)
    except Exception as error:  # the loader raises what any of its many backends raises
        reason = " ".join(str(error).split())[:300]
        raise DataError(
            f"the split {source.split!r} of the dataset {source.name!r} must load, "
            f"got {type(error).__name__}: {reason}; {_remedy(error)}"
        ) from error


def _remedy(error: Exception) -> str:
    if isinstance(error, ConnectionError):
        return "check the name and the network (and HF_HUB_OFFLINE), or use a local folder"
    if isinstance(error, FileNotFoundError):
        return "check the name or the path"
    return "check the name and the split"

"""Tokenize a corpus once; every later run finds the tokens in the cache.

The folder's name is a digest of everything that decides its content (specs, validation fraction,
format, and the state of the source), so a folder is never updated, only found or built.
"""

import hashlib
import json
import logging
import os
import platform
import shutil
from pathlib import Path

from paci.data.corpus import STDLIB, documents, fingerprint
from paci.data.split import check_val_fraction, make_split
from paci.data.store import FORMAT_VERSION, Corpus, install, open_corpus, sibling, write_corpus
from paci.data.tokenizer import build_tokenizer, check_tokenizer_spec
from paci.errors import DataError

_NUM_ATTEMPTS = 3

_logger = logging.getLogger(__name__)


def prepare(
    spec: str,
    tokenizer_spec: str,
    cache_dir: str | os.PathLike[str] | None = None,
    *,
    val_fraction: float = 0.1,
) -> Corpus:
    """Tokenize a corpus, or open its tokens in the cache.

    Any number of processes may call this at once. A damaged folder is built again. A dataset of
    the Hub counts as unchanged as long as its name is the same.

    Args:
        spec: as for `documents`: ``stdlib``, a path, or ``hf:NAME[:SPLIT[:COLUMN]]``.
        tokenizer_spec: ``bytes`` or ``bpe:SIZE`` (trained on the training documents).
        cache_dir: the folder of the cache; ``$PACI_CACHE``, else ``$XDG_CACHE_HOME/paci``, else
            ``~/.cache/paci`` if None.
        val_fraction: expected share of documents for validation, in (0, 1); each document's name
            alone decides. If there is a single document, the share of its characters.

    Raises:
        DataError: a spec or the fraction is not valid, the corpus is missing, empty or changes
            while it is read, or the cache cannot be written.
    """
    check_tokenizer_spec(tokenizer_spec)
    check_val_fraction(val_fraction)
    source = fingerprint(spec)
    recipe = [FORMAT_VERSION, spec, tokenizer_spec, val_fraction, source]
    key = hashlib.sha256(json.dumps(recipe).encode()).hexdigest()[:32]
    folder = _cache_folder(cache_dir) / key
    try:
        for _ in range(_NUM_ATTEMPTS):
            if (corpus := open_corpus(folder)) is not None:
                return corpus
            if folder.exists():
                _logger.warning("%s is damaged and will be built anew", folder)
            install(_build(folder, spec, tokenizer_spec, val_fraction, source), folder)
        if (corpus := open_corpus(folder)) is not None:
            return corpus
    except OSError as error:
        raise DataError(
            f"the cache folder must be writable, got {str(error)!r}; "
            f"set PACI_CACHE or pass another cache_dir"
        ) from error
    raise DataError(
        f"a prepared corpus must stay as it was written, got a damaged one {_NUM_ATTEMPTS} times "
        f"in {str(folder)!r}; set PACI_CACHE or pass another cache_dir"
    )


def _cache_folder(cache_dir: str | os.PathLike[str] | None) -> Path:
    if cache_dir is not None:
        return Path(cache_dir).expanduser()
    if named := os.environ.get("PACI_CACHE"):
        return Path(named).expanduser()
    if shared := os.environ.get("XDG_CACHE_HOME"):
        return Path(shared).expanduser() / "paci"
    return Path.home() / ".cache" / "paci"


def _build(
    folder: Path, spec: str, tokenizer_spec: str, val_fraction: float, source: list[str]
) -> Path:
    """Tokenize into a new folder beside ``folder`` and return its path."""
    facts = {
        "spec": spec,
        "tokenizer_spec": tokenizer_spec,
        "val_fraction": val_fraction,
        "python_version": platform.python_version() if spec == STDLIB else None,
    }
    new_folder = sibling(folder)
    new_folder.mkdir(parents=True)
    try:
        # One pass over the corpus for the split, one for BPE to learn, one to write.
        split = make_split((name for name, _ in documents(spec)), val_fraction)
        train_texts = (text for is_val, text in split.apply(documents(spec)) if not is_val)
        tokenizer = build_tokenizer(tokenizer_spec, train_texts)
        write_corpus(new_folder, split.apply(documents(spec)), tokenizer, facts)
        if fingerprint(spec) != source:
            raise DataError(
                f"a corpus must not change while it is read, got changes in {spec!r}; "
                f"prepare it again once it is complete"
            )
    except BaseException:
        shutil.rmtree(new_folder, ignore_errors=True)
        raise
    return new_folder

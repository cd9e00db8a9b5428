"""Text to train on: a corpus becomes memory-mapped tokens, and tokens become batches.

::

    documents(spec)          (name, text) pairs, always in the same order
      -> prepare(...)        tokenized once into a cache folder, split by document
        -> Corpus            tokenizer, train and validation tokens (memory-mapped)
          -> Sampler         batch(step): a function of seed and step, no state
          -> validation_batches(...)   the same windows every time
"""

from paci.data.corpus import documents
from paci.data.prepare import prepare
from paci.data.sampler import IGNORE_INDEX, Sampler, validation_batches
from paci.data.store import Corpus
from paci.data.tokenizer import (
    BpeTokenizer,
    ByteTokenizer,
    Tokenizer,
    build_tokenizer,
    load_tokenizer,
)

__all__ = [
    "IGNORE_INDEX",
    "BpeTokenizer",
    "ByteTokenizer",
    "Corpus",
    "Sampler",
    "Tokenizer",
    "build_tokenizer",
    "documents",
    "load_tokenizer",
    "prepare",
    "validation_batches",
]

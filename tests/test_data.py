"""Corpus, tokenizers, the cache and the batches."""

import hashlib
import importlib
import json
import logging
import math
import multiprocessing
import os
import subprocess
import sys
from collections.abc import Iterator
from multiprocessing.synchronize import Barrier
from pathlib import Path

import numpy as np
import pytest
from data_helpers import assert_one_line, split_text, write_folder

from paci.data import (
    BpeTokenizer,
    ByteTokenizer,
    Corpus,
    Tokenizer,
    build_tokenizer,
    documents,
    load_tokenizer,
    prepare,
    store,
)
from paci.data import tokenizer as tokenizer_module
from paci.data.split import make_split
from paci.errors import DataError

pytestmark = pytest.mark.usefixtures("own_cache")


# The package's name `prepare` is the function, which hides the module from `import ... as`.
prepare_module = importlib.import_module("paci.data.prepare")
REPOSITORY = Path(str(prepare_module.__file__)).parents[2]
HARD_TEXT = "naïve 漢字 🙂\r\n\ttabs  and\n\n\nlines <|endoftext|> it's \x00 end  "


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_folder(tmp_path / "corpus", num_files=40)


# Tokenizers


@pytest.fixture(scope="module")
def bpe() -> BpeTokenizer:
    return BpeTokenizer.train(["the cat sat on the mat, don't sit\n\n" * 50, "naïve 漢字"], 280)


def test_byte_tokens_are_utf8_bytes() -> None:
    tokenizer = ByteTokenizer()
    tokens = tokenizer.encode("aé")
    assert tokens.dtype == np.uint16
    assert tokens.tolist() == [0x61, 0xC3, 0xA9]
    assert (tokenizer.vocab_size, tokenizer.end_of_text) == (257, 256)
    assert tokenizer.decode([0x61, 256, 0xC3]) == "a<|endoftext|>\ufffd"


def test_round_trip(bpe: BpeTokenizer, tmp_path: Path) -> None:
    for tokenizer in (ByteTokenizer(), bpe):
        tokens = tokenizer.encode(HARD_TEXT)
        assert tokens.dtype == np.uint16
        assert tokenizer.end_of_text not in tokens
        assert tokenizer.decode(tokens.tolist()) == HARD_TEXT
        assert tokenizer.encode("").tolist() == []
        assert tokenizer.decode([]) == ""
        assert tokenizer.decode(tokenizer.encode("a\ud800b")) == "a?b"
        tokenizer.save(tmp_path)
        again = load_tokenizer(tmp_path)
        assert type(again) is type(tokenizer)
        assert again.encode(HARD_TEXT).tolist() == tokens.tolist()
        assert (again.vocab_size, again.end_of_text) == (
            tokenizer.vocab_size,
            tokenizer.end_of_text,
        )


def test_bpe_merges_to_the_size_asked_for(bpe: BpeTokenizer) -> None:
    assert (bpe.vocab_size, bpe.end_of_text) == (280, 279)
    text = "the cat sat on the mat"
    assert len(bpe.encode(text)) < len(text) / 2
    assert bpe.decode([279]) == "<|endoftext|>"
    assert BpeTokenizer.train(["ab"], 5000).vocab_size == 258  # bytes, "ab", end of text


def test_bpe_training_is_deterministic_across_processes(tmp_path: Path) -> None:
    """Hash seeds differ from process to process; merges with equal counts must not."""
    code = (
        "import sys; from pathlib import Path; from paci.data import BpeTokenizer, documents;"
        "texts = [t for n, t in documents('stdlib') if n.startswith('json/')];"
        "BpeTokenizer.train(texts, 700).save(Path(sys.argv[1]))"
    )
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
        command = [sys.executable, "-c", code, str(tmp_path / name)]
        subprocess.run(command, env=environment, check=True, timeout=60)
    first = (tmp_path / "a" / "tokenizer.json").read_text()
    assert first == (tmp_path / "b" / "tokenizer.json").read_text()
    assert load_tokenizer(tmp_path / "a").vocab_size == 700


def test_cutting_long_texts_does_not_change_tokens(
    bpe: BpeTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    alphabet = np.array(list("ab1'!s  \n\n\r\t\x0b\x1c\x85\u2028\xa0é漢"))
    text = "".join(np.random.default_rng(0).choice(alphabet, 5000))
    whole = bpe.encode(text)
    monkeypatch.setattr(tokenizer_module, "_PIECE_CHARS", 10)
    assert len(list(tokenizer_module._pieces(text))) > 50
    assert bpe.encode(text).tolist() == whole.tolist()


@pytest.mark.parametrize(
    "spec", ["byte", "", "bpe", "bpe:", "bpe:x", "bpe:256", "bpe:65536", "bpe:-5", "bpe:1e3"]
)
def test_bad_tokenizer_spec(spec: str, folder: Path) -> None:
    with pytest.raises(DataError, match="'bytes' or 'bpe:SIZE'") as error:
        build_tokenizer(spec, [])
    assert_one_line(error)
    with pytest.raises(DataError, match="'bytes' or 'bpe:SIZE'"):
        prepare(str(folder), spec)


def test_bpe_size_out_of_range() -> None:
    with pytest.raises(DataError, match="257 to 65535") as error:
        BpeTokenizer.train(["a"], 256)
    assert_one_line(error)


@pytest.mark.parametrize("token", [-1, 280, 65535])
def test_unknown_token(bpe: BpeTokenizer, token: int) -> None:
    for tokenizer in (ByteTokenizer(), bpe):
        with pytest.raises(DataError, match="tokens must be in") as error:
            tokenizer.decode([0, token])
        assert_one_line(error)


@pytest.mark.parametrize("content", [None, "", "{", "[]", '{"kind": "other"}'])
def test_damaged_tokenizer_file(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(DataError, match="must be readable") as error:
        load_tokenizer(tmp_path)
    assert_one_line(error)


# Split


def test_a_document_never_changes_sides() -> None:
    names = [f"document {i}" for i in range(2000)]
    few = dict(zip(names[::3], make_split(names[::3], 0.1).is_val, strict=True))
    many = dict(zip(names, make_split(names, 0.1).is_val, strict=True))
    assert few == {name: many[name] for name in few}
    assert 0.07 < np.mean(list(many.values())) < 0.13


def position(name: str) -> float:
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") / 2**64


def test_split_follows_the_documented_hash() -> None:
    names = ["a", "b", "c", "d", "e", "f"]
    expected = [position(name) < 0.5 for name in names]
    assert True in expected
    assert False in expected
    assert make_split(names, 0.5).is_val.tolist() == expected


def test_neither_side_is_empty() -> None:
    names = [f"{i}" for i in range(20)]
    lowest, highest = min(names, key=position), max(names, key=position)
    assert make_split(names, 1e-9).is_val.tolist() == [name == lowest for name in names]
    assert make_split(names, 1 - 1e-9).is_val.tolist() == [name != highest for name in names]
    assert make_split(["same", "same"], 1e-9).is_val.tolist() == [True, False]


@pytest.mark.parametrize("fraction", [0.0, 1.0, -1.0, math.nan])
def test_bad_fraction(fraction: float, folder: Path) -> None:
    with pytest.raises(DataError, match="between 0 and 1") as error:
        prepare(str(folder), "bytes", val_fraction=fraction)
    assert_one_line(error)


# Prepare


def test_prepared_tokens_are_the_documents(folder: Path, tmp_path: Path) -> None:
    corpus = prepare(str(folder), "bytes", val_fraction=0.3)
    train, val = split_text(corpus)
    texts = dict(documents(str(folder)))
    is_val = make_split(texts, 0.3).is_val
    assert train == [
        text for text, on_val in zip(texts.values(), is_val, strict=True) if not on_val
    ]
    assert val == [text for text, on_val in zip(texts.values(), is_val, strict=True) if on_val]
    assert isinstance(corpus.train, np.memmap)
    assert corpus.train.dtype == np.uint16
    assert corpus.folder.parent == tmp_path / "cache"


def test_meta_describes_the_files(folder: Path) -> None:
    corpus = prepare(str(folder), "bytes")
    meta = json.loads((corpus.folder / "meta.json").read_text())
    assert sorted(path.name for path in corpus.folder.iterdir()) == [
        "meta.json",
        "tokenizer.json",
        "train.bin",
        "val.bin",
    ]
    assert meta["spec"] == str(folder)
    assert meta["tokenizer_spec"] == "bytes"
    assert meta["vocab_size"] == 257
    assert meta["python_version"] is None
    for name, tokens in (("train.bin", corpus.train), ("val.bin", corpus.val)):
        content = (corpus.folder / name).read_bytes()
        assert meta["num_tokens"][name] == len(tokens)
        assert meta["num_documents"][name] == np.count_nonzero(tokens == 256)
        assert meta["sha256"][name] == hashlib.sha256(content).hexdigest()
        assert np.frombuffer(content, "<u2").tolist() == tokens.tolist()


def test_bpe_learns_from_training_documents_only(tmp_path: Path) -> None:
    path = write_folder(tmp_path / "corpus", num_files=20)
    is_val = make_split(dict(documents(str(path))), 0.3).is_val
    for file, on_val in zip(sorted(path.iterdir()), is_val, strict=True):
        file.write_text(("qqqqzzzz " if on_val else "the cat sat ") * 30)
    corpus = prepare(str(path), "bpe:280", val_fraction=0.3)
    assert len(corpus.tokenizer.encode("the cat sat")) < 5
    assert len(corpus.tokenizer.encode("qqqqzzzz")) == 8
    assert corpus.tokenizer.decode(corpus.val[:9]).startswith("qqqqzzzz")
    assert corpus.val[-1] == corpus.tokenizer.end_of_text


def test_second_call_reads_the_cache(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = prepare(str(folder), "bytes")
    poisoned = folder / "003.txt"
    before = poisoned.stat()
    poisoned.write_text("x" * before.st_size)
    os.utime(poisoned, ns=(before.st_atime_ns, before.st_mtime_ns))
    monkeypatch.setattr(prepare_module, "write_corpus", None)
    second = prepare(str(folder), "bytes")
    assert second.folder == first.folder
    assert second.digest == first.digest
    assert second.train.tolist() == first.train.tolist()


def test_every_ingredient_is_in_the_key(folder: Path, tmp_path: Path) -> None:
    corpora = [prepare(str(folder), "bytes"), prepare(str(folder), "bytes", val_fraction=0.3)]
    corpora.append(prepare(str(folder), "bpe:300"))
    file = folder / "003.txt"
    os.utime(file, ns=(1, 1))
    corpora.append(prepare(str(folder), "bytes"))
    file.write_text(file.read_text() + "more")
    os.utime(file, ns=(1, 1))
    corpora.append(prepare(str(folder), "bytes"))
    file.rename(folder / "999.txt")
    corpora.append(prepare(str(folder), "bytes"))
    assert len({corpus.folder for corpus in corpora}) == len(corpora)
    assert corpora[0].digest == corpora[3].digest  # the same text, touched
    assert len({corpus.digest for corpus in corpora}) == len(corpora) - 1


def test_cache_place(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def place(cache_dir: Path | None = None) -> Path:
        return prepare(str(folder), "bytes", cache_dir).folder.parent

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert place(tmp_path / "given") == tmp_path / "given"
    assert place() == tmp_path / "cache"
    monkeypatch.delenv("PACI_CACHE")
    assert place() == tmp_path / "xdg" / "paci"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert place() == tmp_path / "home" / ".cache" / "paci"


def test_single_document_holds_out_its_end(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    text = "".join(chr(33 + i % 90) for i in range(200))
    (tmp_path / "one.txt").write_text(text)
    with caplog.at_level(logging.INFO, logger="paci.data"):
        corpus = prepare(str(tmp_path / "one.txt"), "bytes", val_fraction=0.25)
    assert split_text(corpus) == ([text[:150]], [text[150:]])
    assert "last 50 of 200 characters" in caplog.text
    (tmp_path / "two.txt").write_text("ab")
    assert split_text(prepare(str(tmp_path / "two.txt"), "bytes")) == (["a"], ["b"])


def test_single_character(tmp_path: Path) -> None:
    (tmp_path / "one.txt").write_text("a")
    with pytest.raises(DataError, match="at least 2 characters") as error:
        prepare(str(tmp_path / "one.txt"), "bytes")
    assert_one_line(error)
    assert list((tmp_path / "cache").iterdir()) == []


@pytest.mark.parametrize("name", ["train.bin", "val.bin", "meta.json", "tokenizer.json"])
@pytest.mark.parametrize("damage", ["shorter", "missing"])
def test_damaged_cache_is_rebuilt(folder: Path, tmp_path: Path, name: str, damage: str) -> None:
    first = prepare(str(folder), "bytes")
    tokens = first.train.tolist(), first.val.tolist()
    path = first.folder / name
    content = path.read_bytes()
    path.unlink()
    if damage == "shorter":
        path.write_bytes(content[:-2])
    second = prepare(str(folder), "bytes")
    assert (second.train.tolist(), second.val.tolist()) == tokens
    assert path.read_bytes() == content
    assert list((tmp_path / "cache").iterdir()) == [first.folder]


def test_exchanged_tokenizer_is_noticed(folder: Path, bpe: BpeTokenizer) -> None:
    corpus = prepare(str(folder), "bytes")
    bpe.save(corpus.folder)
    assert isinstance(prepare(str(folder), "bytes").tokenizer, ByteTokenizer)


def test_corpus_that_changes_meanwhile(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def change_it(spec: str) -> Iterator[tuple[str, str]]:
        (folder / "new.txt").write_text("new")
        return documents(spec)

    monkeypatch.setattr(prepare_module, "documents", change_it)
    with pytest.raises(DataError, match="must not change while it is read") as error:
        prepare(str(folder), "bytes")
    assert_one_line(error)
    assert list((tmp_path / "cache").iterdir()) == []


def test_cache_that_cannot_be_written(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(DataError, match="cache folder must be writable") as error:
        prepare(str(folder), "bytes", tmp_path / "file" / "cache")
    assert_one_line(error)


def prepare_at_the_same_time(spec: str, cache: str, barrier: Barrier, results: object) -> None:
    """Run in each process: both have built their folder before either puts it in place."""
    install = prepare_module.install

    def wait_and_install(new_folder: Path, folder: Path) -> None:
        barrier.wait(30)
        install(new_folder, folder)

    prepare_module.install = wait_and_install  # type: ignore[attr-defined]
    corpus = prepare(spec, "bytes", cache)
    total = int(corpus.train.astype(np.int64).sum() + corpus.val.astype(np.int64).sum())
    results.put((corpus.digest, total))  # type: ignore[attr-defined]


def test_two_processes_prepare_at_the_same_time(folder: Path, tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    barrier, results = context.Barrier(2), context.Queue()
    arguments = (str(folder), str(tmp_path / "cache"), barrier, results)
    processes = [context.Process(target=prepare_at_the_same_time, args=arguments) for _ in "ab"]
    for process in processes:
        process.start()
    found = [results.get(timeout=60) for _ in processes]
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    corpus = prepare(str(folder), "bytes")
    total = int(corpus.train.astype(np.int64).sum() + corpus.val.astype(np.int64).sum())
    assert found == [(corpus.digest, total)] * 2
    assert list((tmp_path / "cache").iterdir()) == [corpus.folder]


@pytest.mark.parametrize("in_place", ["nothing", "sound", "damaged"])
def test_install_ends_with_a_sound_folder(folder: Path, tmp_path: Path, in_place: str) -> None:
    corpus = prepare(str(folder), "bytes")
    new_folder = tmp_path / "cache" / "new"
    corpus.folder.rename(new_folder)
    if in_place != "nothing":
        assert prepare(str(folder), "bytes").folder == corpus.folder
        (corpus.folder / "marker").touch()
    if in_place == "damaged":
        (corpus.folder / "val.bin").write_bytes(b"")
    prepare_module.install(new_folder, corpus.folder)
    assert list((tmp_path / "cache").iterdir()) == [corpus.folder]
    assert (corpus.folder / "marker").exists() == (in_place == "sound")
    assert prepare_module.open_corpus(corpus.folder) is not None


class TwoTokens(Tokenizer):
    """Tokens a = 0, b = 1 and the end of text = 2."""

    vocab_size = 3
    end_of_text = 2

    def encode(self, text: str) -> np.ndarray:
        raise NotImplementedError

    def decode(self, tokens: object) -> str:
        raise NotImplementedError

    def save(self, folder: Path) -> None:
        raise NotImplementedError


@pytest.mark.parametrize("tokens_per_count", [2, 1000])
def test_unigram_perplexity_by_hand(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tokens_per_count: int
) -> None:
    monkeypatch.setattr(store, "_TOKENS_PER_COUNT", tokens_per_count)
    np.array([0, 0, 0, 1, 2], "<u2").tofile(tmp_path / "train.bin")
    np.array([0, 1, 1, 2], "<u2").tofile(tmp_path / "val.bin")
    train, val = (np.memmap(tmp_path / n, "<u2", "r") for n in ("train.bin", "val.bin"))
    corpus = Corpus(tmp_path, TwoTokens(), train, val, "")
    # p = (3 + 1)/8, (1 + 1)/8, (1 + 1)/8; one token of 1/2 and three of 1/4
    assert corpus.unigram_perplexity() == pytest.approx((2 * 4 * 4 * 4) ** (1 / 4), rel=1e-12)

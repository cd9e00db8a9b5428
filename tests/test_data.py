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
import sysconfig
from collections.abc import Iterator
from multiprocessing.synchronize import Barrier
from pathlib import Path

import numpy as np
import pytest

from paci.data import (
    IGNORE_INDEX,
    BpeTokenizer,
    ByteTokenizer,
    Corpus,
    Sampler,
    Tokenizer,
    build_tokenizer,
    documents,
    load_tokenizer,
    prepare,
    store,
    validation_batches,
)
from paci.data import tokenizer as tokenizer_module
from paci.data.split import make_split
from paci.errors import DataError

# The package's name `prepare` is the function, which hides the module from `import ... as`.
prepare_module = importlib.import_module("paci.data.prepare")
REPOSITORY = Path(str(prepare_module.__file__)).parents[2]
HARD_TEXT = "naïve 漢字 🙂\r\n\ttabs  and\n\n\nlines <|endoftext|> it's \x00 end  "


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PACI_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_folder(tmp_path / "corpus", num_files=40)


def write_folder(path: Path, num_files: int) -> Path:
    path.mkdir()
    for i in range(num_files):
        (path / f"{i:03}.txt").write_text(f"document {i} " + "the cat sat on the mat. " * (i % 7))
    return path


def split_text(corpus: Corpus) -> tuple[list[str], list[str]]:
    """Both sides of a corpus as texts of documents."""

    def cut(tokens: np.ndarray) -> list[str]:
        ends = np.flatnonzero(tokens == corpus.tokenizer.end_of_text)
        assert ends[-1] == len(tokens) - 1
        return [corpus.tokenizer.decode(part[part < 256]) for part in np.split(tokens, ends + 1)]

    assert isinstance(corpus.tokenizer, ByteTokenizer)
    return cut(corpus.train)[:-1], cut(corpus.val)[:-1]


def assert_one_line(error: pytest.ExceptionInfo[DataError]) -> None:
    message = str(error.value)
    assert "\n" not in message
    assert ", got " in message
    assert "; " in message.split(", got ", 1)[1]


# Corpus


def test_stdlib_holds_library_sources_and_nothing_else() -> None:
    found = dict(documents("stdlib"))
    root = Path(sysconfig.get_paths()["stdlib"])
    assert found["json/decoder.py"] == (root / "json/decoder.py").read_bytes().decode()
    assert list(found) == sorted(found)
    assert len(found) > 300
    for name in found:
        assert name.endswith(".py")
        parts = name.split("/")
        assert not {"site-packages", "dist-packages", "test", "tests", "idle_test"} & set(parts)
        assert not parts[-1].startswith("_sysconfigdata")


def test_folder_is_recursive_sorted_and_skips_hidden_binary_and_blank_files(tmp_path: Path) -> None:
    contents = {
        "b.txt": b"bee",
        "a/z.md": b"zed\r\n",
        "a.txt": b"broken \xff utf-8",
        "a/.hidden": b"no",
        ".git/config": b"no",
        "binary.dat": b"no\0no",
        "blank.txt": b" \n\t\n",
        "late_nul.txt": b"x" * 8192 + b"\0",
    }
    for name, content in contents.items():
        path = tmp_path / "corpus" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    assert list(documents(str(tmp_path / "corpus"))) == [
        ("a.txt", "broken \ufffd utf-8"),
        ("a/z.md", "zed\r\n"),
        ("b.txt", "bee"),
        ("late_nul.txt", "x" * 8192 + "\0"),
    ]


def test_single_file_without_separator_is_one_document(tmp_path: Path) -> None:
    (tmp_path / "one.txt").write_bytes(b"first\r\nsecond\n")
    assert list(documents(str(tmp_path / "one.txt"))) == [("one.txt", "first\r\nsecond\n")]


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("a\n<|endoftext|>\nb\n", ["a\n", "b\n"]),
        ("a<|endoftext|>b<|endoftext|>c", ["a", "b", "c"]),
        ("a\r\n <|endoftext|> \r\nb", ["a\r\n", "b"]),
        ("<|endoftext|>\na\n<|endoftext|>\n\n<|endoftext|>\nb<|endoftext|>", ["a\n", "b"]),
        ("a\n<|endoftext|>b\nc\n", ["a\n", "b\nc\n"]),
    ],
)
def test_single_file_splits_at_end_of_text(
    tmp_path: Path, content: str, expected: list[str]
) -> None:
    path = tmp_path / "many.txt"
    path.write_bytes(content.encode())
    assert [text for _, text in documents(str(path))] == expected


def test_a_document_of_a_file_keeps_its_name_when_others_join(tmp_path: Path) -> None:
    path = tmp_path / "many.txt"
    path.write_text("a<|endoftext|>b")
    before = {text: name for name, text in documents(str(path))}
    path.write_text("new<|endoftext|>a<|endoftext|>newer<|endoftext|>b")
    after = {text: name for name, text in documents(str(path))}
    assert before == {text: after[text] for text in before}
    assert len(set(after.values())) == 4


@pytest.mark.parametrize("spec", ["no/such/path", "", "bytes\nwith a line"])
def test_missing_corpus(spec: str) -> None:
    with pytest.raises(DataError, match="existing file or folder") as error:
        documents(spec)
    assert_one_line(error)


def test_corpora_without_text(tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(DataError, match="got none under") as error:
        documents(str(empty))
    assert_one_line(error)
    (empty / "blank.txt").write_text(" \n")
    (empty / "binary").write_bytes(b"\0")
    for path in (empty, empty / "blank.txt"):
        with pytest.raises(DataError, match="must hold text") as error:
            list(documents(str(path)))
        assert_one_line(error)
    with pytest.raises(DataError, match="NUL bytes") as error:
        list(documents(str(empty / "binary")))
    assert_one_line(error)


# Hugging Face


@pytest.fixture
def parquet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf_cache")
    path = tmp_path / "pq"
    path.mkdir()
    rows = {"text": ["one", None, "", "two"], "title": ["A", "B", "C", "D"], "n": [1, 2, 3, 4]}
    datasets.Dataset.from_dict(rows).to_parquet(path / "train.parquet")
    return path


def test_local_parquet_folder(parquet: Path) -> None:
    assert [text for _, text in documents(f"hf:{parquet}")] == ["one", "two"]
    assert [text for _, text in documents(f"hf:{parquet}:train:title")] == ["A", "B", "C", "D"]
    assert [text for _, text in documents(f"hf:{parquet}:train[1:3]:title")] == ["B", "C"]
    train, val = split_text(prepare(f"hf:{parquet}:train:title", "bytes"))
    assert sorted(train + val) == ["A", "B", "C", "D"]


@pytest.mark.parametrize(
    ("rest", "message"),
    [
        (":nope", "split 'nope'.*must load"),
        (":train:nope", r"one of \['text', 'title', 'n'\].*got 'nope'"),
        (":train:n", "must hold text, got int"),
    ],
)
def test_bad_split_and_column(parquet: Path, rest: str, message: str) -> None:
    with pytest.raises(DataError, match=message) as error:
        list(documents(f"hf:{parquet}{rest}"))
    assert_one_line(error)


@pytest.mark.parametrize(
    "spec", ["hf:", "hf::train", "hf:name:", "hf:name::text", "hf:name:[1]:text"]
)
def test_bad_hugging_face_spec(spec: str) -> None:
    with pytest.raises(DataError, match="NAME_OR_PATH") as error:
        documents(spec)
    assert_one_line(error)


def test_hub_name_with_slash_offline_fails_quickly() -> None:
    """In a process of its own, as the library reads HF_HUB_OFFLINE when it is imported."""
    pytest.importorskip("datasets")
    code = "from paci.data import prepare; prepare('hf:Skylion007/openwebtext', 'bytes')"
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    last_line = done.stderr.strip().splitlines()[-1]
    assert last_line.startswith("paci.errors.DataError: the split 'train' of the dataset 'Skylion")
    assert "HF_HUB_OFFLINE" in last_line


def test_datasets_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(DataError, match=r"pip install 'paci\[datasets\]'") as error:
        documents("hf:anything")
    assert_one_line(error)


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


# Batches


def test_batch_is_windows_of_the_tokens() -> None:
    tokens = np.random.default_rng(0).permutation(1000).astype(np.uint16)
    inputs, targets = Sampler(tokens, context=16, batch_size=64, seed=1).batch(0)
    assert inputs.shape == targets.shape == (64, 16)
    assert inputs.dtype == targets.dtype == np.int64
    position = np.argsort(tokens)
    starts = position[inputs[:, 0]]
    assert np.array_equal(inputs, tokens[starts[:, None] + np.arange(16)])
    assert np.array_equal(targets, tokens[starts[:, None] + np.arange(1, 17)])


def test_batches_depend_on_seed_and_step_alone() -> None:
    tokens = np.arange(60000, dtype=np.uint16)
    sampler = Sampler(tokens, context=4, batch_size=8, seed=7)
    in_order = [sampler.batch(step)[0] for step in range(50)]
    again = Sampler(tokens, context=4, batch_size=8, seed=7)
    for step in (49, 3, 3, 0):
        assert np.array_equal(again.batch(step)[0], in_order[step])
    # No step and no seed repeats the rows of another, shifted or not.
    rows = [row[0] for batch in in_order for row in batch]
    for seed in (0, 6, 8, 7 + 2**32, 2**64 - 1):
        other = Sampler(tokens, context=4, batch_size=8, seed=seed)
        rows += [row[0] for step in range(50) for row in other.batch(step)[0]]
    windows = {tuple(pair) for pair in np.lib.stride_tricks.sliding_window_view(rows, 2)}
    assert len(windows) == len(rows) - 1


def test_batch_is_pinned() -> None:
    """A checkpoint resumed on another machine must see the same text."""
    inputs, _ = Sampler(np.arange(1000, dtype=np.uint16), 2, batch_size=4, seed=5).batch(3)
    assert inputs[:, 0].tolist() == [946, 816, 646, 630]


def test_every_place_can_be_drawn() -> None:
    sampler = Sampler(np.arange(6, dtype=np.uint16), context=3, batch_size=200, seed=0)
    assert {row[0] for row in sampler.batch(0)[0]} == {0, 1, 2}
    assert sampler.batch(0)[1].max() == 5
    whole = Sampler(np.arange(4, dtype=np.uint16), context=3, batch_size=1, seed=0)
    assert whole.batch(9)[1].tolist() == [[1, 2, 3]]


def test_validation_windows_are_even_and_do_not_overlap() -> None:
    tokens = np.arange(1001, dtype=np.uint16)
    batches = list(validation_batches(tokens, context=10, batch_size=4, num_sequences=20))
    assert len(batches) == 5
    inputs = np.concatenate([x for x, _ in batches])
    targets = np.concatenate([y for _, y in batches])
    assert inputs[:, 0].tolist() == list(range(0, 1000, 50))
    assert np.array_equal(targets, inputs + 1)
    again = list(validation_batches(tokens, context=10, batch_size=4, num_sequences=20))
    assert np.array_equal(inputs, np.concatenate([x for x, _ in again]))
    exact = list(validation_batches(tokens[:30], context=10, batch_size=3, num_sequences=3))
    assert exact[0][0][:, 0].tolist() == [0, 10, 0]  # a third window would lack its last target
    uneven = validation_batches(tokens, context=10, batch_size=7, num_sequences=63)
    starts = np.concatenate([x[:, 0] for x, _ in uneven])
    assert len(starts) == 63
    assert set(np.diff(starts)) == {10, 20}


@pytest.mark.parametrize("batch_size", [1, 2, 3, 8, 50])
def test_the_size_of_a_batch_does_not_choose_the_windows(batch_size: int) -> None:
    tokens = np.arange(1001, dtype=np.uint16)
    batches = list(validation_batches(tokens, 10, batch_size, num_sequences=20))
    assert {x.shape for x, _ in batches} == {(batch_size, 10)}
    known = [row for x, y in batches for row in x[(y != IGNORE_INDEX).all(axis=1)]]
    assert [row[0] for row in known] == list(range(0, 1000, 50))


def test_last_validation_batch_is_padded() -> None:
    tokens = np.arange(1, 32, dtype=np.uint16)  # 3 windows of 10
    batches = list(validation_batches(tokens, context=10, batch_size=2, num_sequences=10))
    assert [x.shape for x, _ in batches] == [(2, 10), (2, 10)]
    inputs = np.concatenate([x for x, _ in batches])
    targets = np.concatenate([y for _, y in batches])
    assert inputs.dtype == targets.dtype == np.int64
    assert targets[:3].flatten().tolist() == list(range(2, 32))
    assert IGNORE_INDEX == -100
    assert (targets[3] == -100).all()
    assert (inputs[3] == 0).all()


@pytest.mark.parametrize("num_tokens", [0, 10])
def test_corpus_shorter_than_a_window(num_tokens: int) -> None:
    tokens = np.zeros(num_tokens, dtype=np.uint16)
    with pytest.raises(DataError, match=f"context \\+ 1 = 11 tokens, got {num_tokens}") as error:
        Sampler(tokens, context=10, batch_size=1, seed=0)
    assert_one_line(error)
    with pytest.raises(DataError, match="context \\+ 1 = 11 tokens"):
        validation_batches(tokens, context=10, batch_size=1, num_sequences=1)


def test_numbers_out_of_range() -> None:
    tokens = np.zeros(100, dtype=np.uint16)
    for arguments in ((0, 1, 0), (1, 0, 0), (1, 1, -1), (1, 1, 2**64)):
        with pytest.raises(DataError) as error:
            Sampler(tokens, *arguments)
        assert_one_line(error)
    with pytest.raises(DataError, match="step must be"):
        Sampler(tokens, 1, 1, 0).batch(-1)
    for arguments in ((0, 1, 1), (1, 0, 1), (1, 1, 0)):
        with pytest.raises(DataError, match="at least 1, got 0"):
            validation_batches(tokens, *arguments)

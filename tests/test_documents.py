"""Where text comes from, and what is told where there is none."""

import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
from data_helpers import assert_one_line, split_text

import paci
from paci.data import (
    documents,
    prepare,
)
from paci.errors import DataError

REPOSITORY = Path(paci.__file__).parents[1]
pytestmark = pytest.mark.usefixtures("own_cache")


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
        "a.txt": "caf\u00e9".encode(),
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
        ("a.txt", "caf\u00e9"),
        ("a/z.md", "zed\r\n"),
        ("b.txt", "bee"),
        ("late_nul.txt", "x" * 8192 + "\0"),
    ]


@pytest.mark.parametrize("place", [4, (1 << 20) + 3, 3 << 20])
@pytest.mark.parametrize("is_folder", [False, True])
def test_text_in_another_encoding_is_refused(tmp_path: Path, is_folder: bool, place: int) -> None:
    """A character of three bytes is cut in two by the blocks that are read, and is fine."""
    text = ("\u20ac" * (place // 3 + 1)).encode()[: place // 3 * 3] + b"x" * (place % 3)
    (tmp_path / "one.txt").write_bytes(text + b"\xe9t\xe9\n")
    with pytest.raises(DataError) as refused:
        list(documents(str(tmp_path if is_folder else tmp_path / "one.txt")))
    path = str(tmp_path / "one.txt")
    assert str(refused.value) == (
        f"a corpus file must be UTF-8, got another encoding in {path!r} (byte {place}); convert "
        f"it, as with iconv -f LATIN1 -t UTF-8"
    )


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
    with pytest.raises(DataError, match=r"pip install 'paci-pipeline\[datasets\]'") as error:
        documents("hf:anything")
    assert_one_line(error)

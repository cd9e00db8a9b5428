"""Read a corpus: its spec becomes named documents in a fixed order.

==========================  ==========================================================
``stdlib``                  the ``*.py`` text of the running Python's standard library
``PATH``                    a text file, or a folder of text files (recursive)
``hf:NAME[:SPLIT[:COLUMN]]``  a Hugging Face dataset (see ``huggingface.py``)
==========================  ==========================================================

A file or folder that is really called ``stdlib`` is reached as ``./stdlib``.
"""

import hashlib
import os
import platform
import sysconfig
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from paci.data import huggingface
from paci.data.tokenizer import END_OF_TEXT
from paci.errors import DataError

STDLIB = "stdlib"

_SNIFFED_BYTES = 8192
# Tests are left out, and third-party packages do not belong to the library. The records of how
# this very Python was built differ from host to host; without them, hosts with the same Python
# see the same corpus.
_STDLIB_SKIPPED_FOLDERS = frozenset(
    {"site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test"}
)
_STDLIB_SKIPPED_PREFIXES = ("_sysconfigdata_", "config-")


def documents(spec: str) -> Iterator[tuple[str, str]]:
    """Read a corpus as documents, the same ones in the same order on every call.

    Files are read as UTF-8, with U+FFFD in place of what is not. A single file is one document,
    or several if it holds ``<|endoftext|>``, on a line of its own (the line is dropped) or within
    a line; a folder holds one document per file, sorted by relative path, without hidden files,
    binary files (a NUL byte in the first 8 KiB) and links to folders. Documents of nothing but
    white space are dropped.

    Args:
        spec: ``stdlib``, a path, or ``hf:NAME[:SPLIT[:COLUMN]]``.

    Returns:
        ``(name, text)`` pairs. A file of a folder is named by its relative path; a part of a file
        and a row of a dataset by a digest of its text, so that no name depends on which other
        documents there are, nor on where the corpus lies.

    Raises:
        DataError: the path or dataset is missing (raised here), or there is no text in it
            (raised once the iterator has found out).
    """
    if spec.startswith(huggingface.PREFIX):
        source = huggingface.parse(spec)
        texts = huggingface.read_texts(source)
        return _not_empty(((_content_name(source.column, text), text) for text in texts), spec)
    root, files = _files(spec)
    if root.is_file():
        return _not_empty(_documents_of_file(root), spec)
    return _not_empty(((name, _read(root / name)) for name in files), spec)


def fingerprint(spec: str) -> list[str]:
    """Describe the state of a corpus without reading its text; it changes when the corpus does.

    Args:
        spec: as for `documents`.

    Returns:
        Lines for the source (absolute path, Python version or dataset name), then one line per
        file: relative path, size in bytes, modification time in nanoseconds.

    Raises:
        DataError: the path is missing, or the folder holds no file.
    """
    if spec.startswith(huggingface.PREFIX):
        source = huggingface.parse(spec)
        folder = Path(source.name)
        if not folder.is_dir():
            return [source.name]
        states = _file_states(folder, _walk(folder, "", _is_hidden))
        return [os.path.abspath(folder), *states]
    root, files = _files(spec)
    if root.is_file():
        return [str(root), *_file_states(root.parent, [root.name])]
    version = [platform.python_version()] if spec == STDLIB else []
    return [str(root), *version, *_file_states(root, files)]


def _content_name(prefix: str, text: str) -> str:
    """Return a name for a document without one, made from its text: ``prefix#digest``."""
    return f"{prefix}#{hashlib.sha256(text.encode('utf-8', 'replace')).hexdigest()[:16]}"


def _files(spec: str) -> tuple[Path, list[str]]:
    """Return a corpus' root and, if that is a folder, the sorted relative paths in it."""
    if spec == STDLIB:
        root, suffix, skip = Path(sysconfig.get_paths()["stdlib"]), ".py", _is_foreign
    else:
        root, suffix, skip = Path(os.path.abspath(Path(spec).expanduser())), "", _is_hidden
    if not spec or not root.exists():
        raise DataError(
            f"a corpus must be 'stdlib', an existing file or folder, or "
            f"'hf:NAME[:SPLIT[:COLUMN]]', got {spec!r}; check the path"
        )
    if not root.is_dir():
        return root, []
    files = _walk(root, suffix, skip)
    if not files:
        raise DataError(
            f"a corpus folder must hold text files, got none under {str(root)!r}; "
            f"hidden files do not count"
        )
    return root, files


def _is_hidden(name: str) -> bool:
    return name.startswith(".")


def _is_foreign(name: str) -> bool:
    return (
        _is_hidden(name)
        or name in _STDLIB_SKIPPED_FOLDERS
        or name.startswith(_STDLIB_SKIPPED_PREFIXES)
    )


def _walk(root: Path, suffix: str, skip: Callable[[str], bool]) -> list[str]:
    """List the regular files under a folder as sorted relative POSIX paths."""

    def fail(error: OSError) -> None:
        raise _unreadable(Path(error.filename), error) from error

    found = []
    for folder, subfolders, names in os.walk(root, onerror=fail):
        subfolders[:] = [name for name in subfolders if not skip(name)]
        for name in names:
            path = Path(folder, name)
            if name.endswith(suffix) and not skip(name) and path.is_file():
                found.append(path.relative_to(root).as_posix())
    return sorted(found)


def _file_states(root: Path, files: Iterable[str]) -> list[str]:
    states = []
    for name in files:
        try:
            status = (root / name).stat()
        except OSError as error:
            raise _unreadable(root / name, error) from error
        states.append(f"{name} {status.st_size} {status.st_mtime_ns}")
    return states


def _unreadable(path: Path, error: OSError) -> DataError:
    reason = error.strerror or type(error).__name__
    return DataError(
        f"a corpus file must be readable, got {reason!r} for {str(path)!r}; "
        f"change its permissions, or move it away"
    )


def _not_utf8(path: Path, place: int) -> DataError:
    return DataError(
        f"a corpus file must be UTF-8, got another encoding in {str(path)!r} (byte {place}); "
        f"convert it, as with iconv -f LATIN1 -t UTF-8"
    )


def _first_bad_byte(path: Path) -> int:
    """Return the offset of the first byte that is not UTF-8."""
    place = 0
    left = b""
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            content = left + block
            try:
                content.decode("utf-8")
                left = b""
            except UnicodeDecodeError as error:
                if error.end < len(content):
                    return place + error.start
                left = content[error.start :]  # perhaps cut in the midst of a character
            place += len(content) - len(left)
    return place


def _is_binary(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            return b"\0" in file.read(_SNIFFED_BYTES)
    except OSError as error:
        raise _unreadable(path, error) from error


def _read(path: Path) -> str:
    """Return a file's text, or an empty string for a binary file."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise _unreadable(path, error) from error
    if b"\0" in content[:_SNIFFED_BYTES]:
        return ""
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise _not_utf8(path, error.start) from error


def _documents_of_file(path: Path) -> Iterator[tuple[str, str]]:
    """Yield the documents of one file, holding no more than one of them in memory."""
    if _is_binary(path):
        raise DataError(
            f"a corpus file must be text, got NUL bytes in {str(path)!r}; "
            f"for parquet or arrow files use 'hf:FOLDER'"
        )
    try:
        # newline="" keeps line ends as they are.
        with path.open(encoding="utf-8", newline="") as lines:
            is_split = False
            for text, is_split in _split_at_end_of_text(lines):
                yield (_content_name(path.name, text) if is_split else path.name), text
    except OSError as error:
        raise _unreadable(path, error) from error
    except UnicodeDecodeError as error:
        raise _not_utf8(path, _first_bad_byte(path)) from error


def _split_at_end_of_text(lines: Iterable[str]) -> Iterator[tuple[str, bool]]:
    """Cut lines at ``<|endoftext|>``; yield each text, and whether there was one so far."""
    is_split = False
    parts: list[str] = []
    for line in lines:
        if END_OF_TEXT not in line:
            parts.append(line)
            continue
        is_split = True
        pieces = ["", ""] if line.strip() == END_OF_TEXT else line.split(END_OF_TEXT)
        for piece in pieces[:-1]:
            parts.append(piece)
            yield "".join(parts), is_split
            parts = []
        parts.append(pieces[-1])
    yield "".join(parts), is_split


def _not_empty(found: Iterable[tuple[str, str]], spec: str) -> Iterator[tuple[str, str]]:
    """Drop blank documents; raise at the end if that leaves none."""
    is_empty = True
    for name, text in found:
        if text and not text.isspace():
            is_empty = False
            yield name, text
    if is_empty:
        raise DataError(
            f"a corpus must hold text, got only empty or binary documents in {spec!r}; "
            f"name a corpus with text in it"
        )

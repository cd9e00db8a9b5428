"""Schedules by name: options, files of one's own, and what is refused."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from paci.errors import ConfigError
from paci.schedule.check import check
from paci.schedule.gpipe import GPipe
from paci.schedule.one_f_one_b import OneFOneBFlush
from paci.schedule.paci import PACI
from paci.schedule.registry import PATH_VARIABLE, make_schedule, schedules

# Arguments


@pytest.mark.parametrize("cls", [PACI, OneFOneBFlush, GPipe])
@pytest.mark.parametrize("wrong", [0, -1, True, False, 2.0, "2", None])
def test_counts_must_be_whole_and_positive(cls: Any, wrong: object):
    for arguments in ((wrong, 2), (2, wrong)):
        with pytest.raises(ConfigError, match=rf"whole number of at least 1, got {wrong!r};"):
            cls(*arguments)
    with pytest.raises(ValueError, match="num_stages must be"):  # users need not know our tree
        cls(wrong, 2)


def test_the_message_names_the_argument():
    with pytest.raises(ConfigError, match=r"^accumulation must be"):
        PACI(2, 0)
    with pytest.raises(ConfigError, match=r"^num_micro_batches must be"):
        GPipe(2, 0)
    with pytest.raises(ConfigError, match=r"^slack must be a whole number of at least 0, got -1;"):
        PACI(2, 2, slack=-1)
    for wrong in (True, 1.0):
        with pytest.raises(ConfigError, match=r"^slack must be"):
            PACI(2, 2, slack=wrong)  # type: ignore[arg-type]
    assert PACI(2, 2, slack=0).slack == 0


@pytest.mark.parametrize("wrong", [0, -3, True, 1.5])
def test_num_updates_must_be_a_count(wrong: Any):
    with pytest.raises(ConfigError, match="num_updates must be"):
        check(PACI(2, 2), num_updates=wrong)


@pytest.mark.parametrize("stage", [-1, 3, 100])
def test_a_stage_must_be_placed(stage: int):
    with pytest.raises(ConfigError, match=f"one of the 3 of the placement, got {stage}"):
        PACI(3, 2).worker_of(stage)


# Names and options


def test_names_and_options_are_read():
    assert make_schedule("paci", 4, 2) == PACI(4, 2)
    assert make_schedule("paci:slack=2", 4, 2) == PACI(4, 2, slack=2)
    assert make_schedule("paci:", 4, 2) == PACI(4, 2)
    assert make_schedule("1f1b", 4, 2) == OneFOneBFlush(4, 2)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("pacy", r"must be one of .*1f1b, .*gpipe, .*paci.*, got 'pacy'; choose one"),
        ("", r"got ''"),
        ("PACI", r"got 'PACI'"),
        ("paci:slak=1", r"must be one of slack=\.\.\., .*, got 'slak=1'"),
        ("paci:slack", r"must be one of slack=\.\.\., .*, got 'slack'"),
        ("paci:slack=1,lag=2", r"got 'lag=2'"),
        (
            "paci:slack=",
            r"slack of schedule 'paci' must be int or several with / between them, got ''",
        ),
        (
            "paci:slack=1.5",
            r"must be int or several with / between them, got '1.5'; write it like its default",
        ),
        (
            "paci:split_backward=1",
            r"split_backward of .* must be bool, got '1'; write",
        ),
        ("paci:slack=-1", r"slack must be a whole number of at least 0, got -1"),
        ("paci:accumulation=3", r"got 'accumulation=3'"),
        ("gpipe:slack=1", r"must be one of none, got 'slack=1'"),
    ],
)
def test_wrong_names_and_options_are_refused(spec: str, message: str):
    with pytest.raises(ConfigError, match=message) as caught:
        make_schedule(spec, 4, 2)
    assert "\n" not in str(caught.value)
    assert caught.value.exit_code == 2


# Files of the user

MINE = '''
from dataclasses import dataclass
from paci.schedule.paci import PACI

@dataclass(frozen=True)
class Mine(PACI):
    """A schedule of my own."""
    extra: float = 0.5
    name = {name!r}
    summary = "my own"
'''


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(PATH_VARIABLE, str(tmp_path))
    return tmp_path


def test_a_file_is_discovered(folder: Path):
    (folder / "mine.py").write_text(MINE.format(name="mine"))
    (folder / "notes.txt").write_text("no Python")
    found = schedules()
    assert set(found) == {*found, "mine", "paci"}
    assert list(found) == sorted(found)
    mine = make_schedule("mine:slack=1,extra=0.25", 3, 2)
    assert (mine.num_stages, mine.slack, mine.extra) == (3, 1, 0.25)  # type: ignore[attr-defined]
    check(mine)
    assert schedules()["mine"] is found["mine"]


def test_several_folders_are_searched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    folders = [tmp_path / name for name in ("one", "two")]
    for path in folders:
        path.mkdir()
        (path / "same_file_name.py").write_text(MINE.format(name=path.name))
    monkeypatch.setenv(PATH_VARIABLE, os.pathsep.join(["", *map(str, folders)]))
    assert {"one", "two"} <= set(schedules())
    monkeypatch.delenv(PATH_VARIABLE)
    assert not {"one", "two"} & set(schedules())


@pytest.mark.parametrize("text", ["def broken(:\n", "import no_such_module\n", "1 / 0\n"])
def test_a_broken_file_is_named_and_stays_broken(folder: Path, text: str):
    (folder / "broken.py").write_text(text)
    for _ in range(2):
        with pytest.raises(ConfigError, match=r"must be a Python module, got .*broken\.py") as it:
            make_schedule("paci", 2, 2)
        assert it.value.__cause__ is not None
    (folder / "broken.py").write_text(MINE.format(name="mended"))
    assert "mended" in schedules()


@pytest.mark.parametrize("name", ["paci", "twin"])
def test_two_schedules_of_one_name_are_refused(folder: Path, name: str):
    (folder / "first.py").write_text(MINE.format(name=name))
    (folder / "second.py").write_text(MINE.format(name="twin"))
    with pytest.raises(ConfigError, match=f"a name of its own, got '{name}' twice"):
        schedules()


_PLAIN = """
from dataclasses import dataclass
from paci.schedule.paci import PACI

@dataclass(frozen=True)
class Mine(PACI):
    {body}
"""


def test_a_schedule_needs_a_name_of_its_own_kind(folder: Path):
    (folder / "mine.py").write_text(_PLAIN.format(body="name = None"))
    with pytest.raises(ConfigError, match="each Schedule must have a name, got None"):
        schedules()


def test_an_alias_and_a_folder_named_twice_are_no_clash(
    folder: Path, monkeypatch: pytest.MonkeyPatch
):
    (folder / "mine.py").write_text(_PLAIN.format(body="name = 'mine'") + "\nAlias = Mine\n")
    monkeypatch.setenv(PATH_VARIABLE, os.pathsep.join([str(folder), str(folder)]))
    assert "mine" in schedules()


def test_options_are_read_by_the_type_of_their_default(folder: Path):
    body = "name = 'mine'\n    fast: bool = True\n    scale: float = 1.0\n    mode: str = 'a'"
    (folder / "mine.py").write_text(_PLAIN.format(body=body))
    made: Any = make_schedule("mine:fast=false,scale=2,mode=b,slack=1", 4, 2)
    assert (made.fast, made.scale, made.mode, made.slack) == (False, 2.0, "b", 1)
    with pytest.raises(ConfigError, match="option fast of schedule 'mine' must be bool, got '1'"):
        make_schedule("mine:fast=1", 4, 2)


def test_an_option_needs_a_default_that_text_can_stand_for(folder: Path):
    (folder / "mine.py").write_text(_PLAIN.format(body="name = 'mine'\n    x: object = None"))
    with pytest.raises(ConfigError, match=r"must have a default .* got none for x of Mine"):
        make_schedule("mine", 4, 2)


def test_a_folder_that_is_not_there_and_a_file_that_exits(
    folder: Path, monkeypatch: pytest.MonkeyPatch
):
    (folder / "exits.py").write_text("raise SystemExit(3)")
    with pytest.raises(ConfigError, match=r"must be a Python module, got .*exits.py"):
        schedules()
    monkeypatch.setenv(PATH_VARIABLE, str(folder / "nowhere"))
    with pytest.raises(ConfigError, match=r"must name folders, got .*nowhere"):
        schedules()

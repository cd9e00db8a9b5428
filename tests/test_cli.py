"""The command line: its commands, their help, and what becomes of their output."""

from __future__ import annotations

import os
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import cli_helpers as cli
import pytest
from cli_helpers import Shop

import paci
from paci.schedule.registry import schedules
from paci.schedule.versions import analyse
from paci.train.config import TrainConfig

# `paci` where importing torch fails.
WITHOUT_TORCH = """
import sys
sys.modules["torch"] = None
from paci.cli import main
sys.exit(main())
"""


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Shop:
    return Shop(tmp_path_factory.mktemp("cli"))


def help_of(shop: Shop, *arguments: str, capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as end:
        cli.main([*arguments, "--help"])
    assert end.value.code == 0
    return capsys.readouterr().out


def test_version(shop: Shop, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as end:
        cli.main(["--version"])
    assert end.value.code == 0
    assert capsys.readouterr().out == f"paci {paci.__version__}\n"


def test_help_lists_the_commands(shop: Shop, capsys: pytest.CaptureFixture[str]):
    text = help_of(shop, capsys=capsys)
    for command in ("train", "generate", "schedules"):
        assert f"\n    {command}" in text
        assert help_of(shop, command, capsys=capsys).startswith(f"usage: paci {command} ")


def test_help_lists_each_option_once_with_its_default(
    shop: Shop, capsys: pytest.CaptureFixture[str]
):
    text = help_of(shop, "train", capsys=capsys)
    listed = text[text.index("\noptions:") :]
    first_words = [line.split()[0] for line in listed.splitlines() if line.startswith("  --")]
    wanted = ["--" + name.replace("_", "-") for name in TrainConfig.model_fields]
    assert [word.rstrip(",") for word in first_words] == ["--config", *wanted]
    joined = " ".join(listed.split())
    for name, field in TrainConfig.model_fields.items():
        assert " ".join((field.description or "?").split()) in joined, name
        if not isinstance(field.default, bool | None):
            assert f"(default {field.default})" in joined, name


def test_without_a_command_there_is_one_line(shop: Shop):
    done = shop.call()
    assert done.code == 2
    assert "COMMAND" in done.error
    assert "paci --help" in done.error


def test_schedules_lists_and_draws_without_torch(shop: Shop):
    listed = shop.call("schedules")
    assert listed.code == 0
    assert [line.split()[0] for line in listed.out.splitlines()] == sorted([*schedules(), "gated"])
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_TORCH, "schedules", "paci:slack=1", "--accumulation", "2"],
        capture_output=True,
        text=True,
        timeout=cli.LIMIT_S,
        check=True,
    )
    assert (done.stderr, done.stdout) == (
        "",
        shop.call("schedules", "paci:slack=1", "--accumulation", 2).out,
    )


def test_a_schedule_is_drawn_and_analysed(shop: Shop):
    svg = shop.folder / "picture.svg"
    arguments = ("--stages", 3, "--accumulation", 2, "--updates", 1, "--svg", svg)
    done = shop.call("schedules", "paci", *arguments)
    assert (done.code, done.err) == (0, "")
    lines = done.out.splitlines()
    assert lines[0] == (
        "PACI(num_stages=3, accumulation=2, slack=0, split_backward=False): legal over 1 updates "
        "and the drain"
    )
    grid = [line.partition(")")[2].split() for line in lines if line.startswith("stage ")][:3]
    assert grid == [["F0", "F1", "B0", "B1*"], ["F0", "F1", "B0", "B1*"], ["F0", "B0", "F1", "B1*"]]
    # A table with a row per stage: in flight, drift and its bound.
    table = [line.split() for line in lines if line[:5].strip().isdigit()]
    expected = analyse(paci.PACI(3, 2), num_updates=20)
    assert [row[:4] for row in table] == [
        [str(each.stage), str(each.peak_in_flight), str(each.max_drift), f"({bound})"]
        for each, bound in zip(expected, (1, 1, 0), strict=True)
    ]
    assert ElementTree.parse(svg).getroot().tag.endswith("svg")


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_nobody_has_to_read_the_output(shop: Shop, unbuffered: str):
    """A pipe that is closed at its other end, as `head` does: no traceback, whatever is printed."""
    env = {**os.environ, **shop.env, "PYTHONUNBUFFERED": unbuffered}
    for arguments in (["schedules"], ["schedules", "1f1b", "--updates", "99"], ["--version"]):
        reader, writer = os.pipe()
        os.close(reader)
        try:
            done = subprocess.run(
                [sys.executable, "-c", WITHOUT_TORCH, *arguments],
                env=env,
                stdout=writer,
                stderr=subprocess.PIPE,
                timeout=cli.LIMIT_S,
                check=False,
            )
        finally:
            os.close(writer)
        # argparse itself keeps silent about what it could not print.
        assert done.returncode in ((0, 1) if arguments == ["--version"] else (1,))
        assert done.stderr == b""


def test_a_terminal_that_cannot_show_a_text_does_not_end_a_run(shop: Shop):
    """Bytes that are no UTF-8, in the ASCII of a bare terminal."""
    out = shop.new()
    env = {"PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"}
    options = shop.options(out=out, sample_tokens=100)
    with shop.command(*options, env=env) as command:
        done = command.wait()
    assert (done.code, done.err) == (0, "")
    assert "\ufffd" in (out / "sample.txt").read_text(encoding="utf-8")
    assert f"weights sha256 {cli.digest(out)}" in done.out


def test_runs_go_to_a_folder_of_their_own_by_default(
    shop: Shop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    done = shop.call(*shop.options(schedule="paci:slack=1"))
    assert done.code == 0, done.err
    (folder,) = (tmp_path / "runs").iterdir()
    assert folder.name.startswith("paci-")
    assert f"run folder runs/{folder.name}" in done.out
    assert cli.summary(folder)["options"]["schedule"] == "paci:slack=1"

"""What the documents say is what the code does."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import paci
from paci.cli.app import make_parser
from paci.schedule.check import check
from paci.schedule.registry import PATH_VARIABLE, make_schedule
from paci.train.config import TrainConfig, load_config

ROOT = Path(__file__).parent.parent
DOCUMENTS = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")])


def blocks(document: Path, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", document.read_text(encoding="utf-8"), re.DOTALL)


def test_the_example_of_the_readme_runs(capsys: pytest.CaptureFixture[str]):
    (example,) = blocks(ROOT / "README.md", "python")
    exec(compile(example, "README.md", "exec"), {})
    printed = capsys.readouterr().out
    # At stage 0, 3 micro-batches of each update are under way when it comes; not so in the ten that
    # are drained, and in the first of the rest there is none from before.
    assert "tensor(" in printed
    assert re.search(r"Counter\(\{0: 533, 1: 267\}\)", printed), printed


def test_the_model_of_ones_own_trains(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.chdir(tmp_path)
    page = ROOT / "docs" / "your-model.md"
    names: dict[str, Any] = {"__name__": "page"}
    for code in blocks(page, "python"):
        exec(compile(code, page.name, "exec"), names)
    *_, last, held_out = capsys.readouterr().out.split()
    assert float(last) < 0.2
    assert float(held_out) < 0.2
    parts = names["muon"](names["stages"][0]).param_groups
    assert [group["algorithm"] for group in parts] == ["muon", "adamw"]
    names["pipeline"].step(names["batch"](60))  # after the state has been loaded
    names["pipeline"].drain()


def test_the_example_file_runs():
    example = [sys.executable, str(ROOT / "examples" / "mlp.py")]
    done = subprocess.run(example, capture_output=True, text=True, timeout=120, check=True)
    assert re.match(r"loss 0\.\d+, drift by stage \{0: ", done.stdout)


def test_the_schedule_of_contributing_is_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (code,) = blocks(ROOT / "CONTRIBUTING.md", "python")
    (tmp_path / "one_at_a_time.py").write_text(code, encoding="utf-8")
    monkeypatch.setenv(PATH_VARIABLE, str(tmp_path))
    check(make_schedule("one-at-a-time", 3, 2))


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_somewhere(document: Path):
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", document.read_text(encoding="utf-8")):
        if not target.startswith("http"):
            assert (document.parent / target).exists(), f"{document.name} links to {target}"


def commands() -> list[str]:
    lines = [
        line.split("#")[0].strip()
        for document in DOCUMENTS
        for block in blocks(document, "bash")
        for line in block.replace("\\\n", " ").splitlines()
    ]
    return sorted(
        # Words in capitals stand for what the reader chooses.
        {
            re.sub(r"\b(A|BATCH|UPDATES)\b", "8", line.replace("SCHEDULE", "paci"))
            for line in lines
            if re.search(r"(^|-m )paci ", line)
        }
    )


@pytest.mark.parametrize("command", commands())
def test_commands_of_the_documents_are_understood(command: str):
    arguments = shlex.split(command[re.search(r"(^|-m )paci ", command).end() :])
    if "--help" in arguments:
        return
    options = vars(make_parser().parse_args(arguments))
    if options["command"] == "train":
        given = {k: v for k, v in options.items() if k in TrainConfig.model_fields}
        file = options["config"]
        load_config(None if file is None else str(ROOT / file), given)


def test_there_are_commands_to_check():
    assert len(commands()) >= 6


def test_tables_and_pictures_are_those_of_the_code(tmp_path: Path):
    script = [sys.executable, str(ROOT / "docs" / "generate.py"), str(tmp_path / "docs")]
    subprocess.run(script, check=True, timeout=120)
    made = sorted(path for path in tmp_path.rglob("*") if path.is_file())
    assert {"README.md", "benchmarks.md", "schedules.md", "paci.svg", "bench-memory.svg"} <= {
        path.name for path in made
    }
    for path in made:
        committed = ROOT / path.relative_to(tmp_path)
        assert committed.read_bytes() == path.read_bytes(), f"{committed} is stale: make docs"


def test_the_example_configuration_is_valid():
    config = load_config(str(ROOT / "examples" / "first.toml"), {})
    assert (config.workers, config.stages) == (2, 2)


def test_the_public_surface():
    assert " ".join(paci.__all__) == (
        "PACI CheckpointError ConfigError CrossEntropy DataError DriftError GPipe Lookahead Loss "
        "MuonWithAdamW OneFOneBFlush PaciError PaciV Pipeline Schedule ScheduleError Split "
        "StepResult WeightPolicy Whole WorkerError __version__ add_loss balanced_cut "
        "collect_losses hosted_stages"
    )
    for name in paci.__all__:
        assert getattr(paci, name) is not None
    assert set(dir(paci)) == set(paci.__all__)
    with pytest.raises(AttributeError, match="no attribute 'Pipelin'"):
        paci.Pipelin  # noqa: B018

"""What the distribution is called, what it needs, and what works with nothing else installed."""

from __future__ import annotations

import importlib.metadata
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from paci.cli.extras import DISTRIBUTION, PACKAGES

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
EXTRAS = PROJECT["optional-dependencies"]
CORE = {"torch", "numpy", "safetensors"}

# Python that finds no package but CORE, what CORE needs, and paci itself.
WITHOUT_EXTRAS = f"""
import sys
import importlib.metadata as metadata
from importlib.machinery import PathFinder
import re

def key(name):
    return re.sub("[-_.]+", "-", name).lower()

needed, asked = {{{DISTRIBUTION!r}}}, {sorted(CORE)}
while asked:
    name = asked.pop()
    if key(name) not in needed:
        needed.add(key(name))
        try:
            listed = metadata.requires(name) or []
        except metadata.PackageNotFoundError:  # needed on another platform
            continue
        asked += [re.match("[A-Za-z0-9_.-]+", each)[0] for each in listed if "extra ==" not in each]
owners = metadata.packages_distributions()
hidden = {{module for module, names in owners.items() if not needed & set(map(key, names))}}
assert {{"pydantic", "tokenizers", "matplotlib", "datasets", "tensorboard", "pandas"}} <= hidden
assert hidden.isdisjoint({sorted(CORE)})

class Bare:
    @staticmethod
    def find_spec(name, path=None, target=None):
        if name.partition(".")[0] not in hidden:
            return PathFinder.find_spec(name, path, target)

assert hidden.isdisjoint(sys.modules)
sys.path.insert(0, {str(ROOT)!r})
sys.meta_path[:] = [each for each in sys.meta_path if each.__module__ == "_frozen_importlib"]
sys.meta_path.append(Bare)
"""
COMMAND = "from paci.cli import main; sys.exit(main())"
PIPELINE = """
from functools import partial
import torch
import paci

for name in paci.__all__:
    getattr(paci, name)
stages = [torch.nn.Linear(4, 4) for _ in range(2)]
before = [stage.weight.detach().clone() for stage in stages]
schedule = paci.PACI(num_stages=2, accumulation=2)
adamw = partial(torch.optim.AdamW, lr=0.01)
with paci.Pipeline(stages, schedule, adamw, torch.nn.MSELoss(), flush_first=1) as pipeline:
    for _ in range(3):
        pipeline.step(torch.ones(4, 4), torch.zeros(4, 4))
    pipeline.drain()
    pipeline.state_dict()
assert not any(old.equal(stage.weight) for old, stage in zip(before, stages))
"""


def bare(code: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    """Run code with ``sys.argv[1:]`` where no extra is installed."""
    return subprocess.run(
        [sys.executable, "-I", "-c", WITHOUT_EXTRAS + code, *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )


def names(requirements: list[str]) -> set[str]:
    return {re.match(r"[\w.-]+", each)[0] for each in requirements}


# --- metadata -----------------------------------------------------------------------------------


def test_the_package_itself_needs_three_others():
    assert names(PROJECT["dependencies"]) == CORE


def test_what_is_installed_is_what_the_project_says():
    try:
        installed = importlib.metadata.requires(DISTRIBUTION) or []
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("run from source, or installed under the name of before; `make` renews it")
    assert names([each for each in installed if "extra ==" not in each]) == CORE
    assert set(importlib.metadata.metadata(DISTRIBUTION).get_all("Provides-Extra")) == set(EXTRAS)


def test_the_name_is_not_that_of_a_stranger():
    assert PROJECT["name"] == DISTRIBUTION != "paci"
    assert PROJECT["scripts"] == {"paci": "paci.cli:main"}


def test_extras_are_what_commands_ask_for():
    assert names(EXTRAS["train"]) == set(PACKAGES["train"])
    assert f"{DISTRIBUTION}[train]" in EXTRAS["bench"]
    assert names(EXTRAS["bench"] + EXTRAS["train"]) - {DISTRIBUTION} == set(PACKAGES["bench"])
    others = ",".join(extra for extra in EXTRAS if extra != "dev")
    assert f"{DISTRIBUTION}[{others}]" in EXTRAS["dev"]


def test_every_remedy_names_this_distribution_and_an_extra_of_it():
    files = [path for part in ("paci", "docs") for path in (ROOT / part).rglob("*.[pm][yd]")]
    found = 0
    for path in [*files, ROOT / "README.md", ROOT / "CONTRIBUTING.md"]:
        if path.parent.name == "decisions":
            continue  # they tell of the name that was
        for name, extra in re.findall(r"'([\w{}-]+)\[([\w{}]+)\]'", path.read_text("utf-8")):
            found += 1
            assert name in (DISTRIBUTION, "{DISTRIBUTION}", "PATH_OF_THIS_FOLDER"), path
            assert extra in (*EXTRAS, "{extra}"), path
    assert found >= 5


# --- without extras -----------------------------------------------------------------------------


def test_a_pipeline_trains_without_extras():
    done = bare(PIPELINE)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize(
    "arguments",
    [
        ["schedules"],
        ["schedules", "paci", "--svg", "{folder}/a.svg"],
        ["view", "paci"],
        ["view", "paci", "1f1b", "--html", "{folder}/a.html", "--perfetto", "{folder}/a.json"],
    ],
    ids=" ".join,
)
def test_schedules_are_drawn_without_extras(tmp_path: Path, arguments: list[str]):
    done = bare(COMMAND, *(each.format(folder=tmp_path) for each in arguments))
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout


def test_a_run_is_reported_without_extras(tmp_path: Path):
    row = '{"update": 1, "tokens": 9, "loss": 2.5, "elapsed_s": 1.0}\n'
    (tmp_path / "metrics.jsonl").write_text(row)
    done = bare(COMMAND, "report", tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert (tmp_path / "report.html").exists()


@pytest.mark.parametrize(
    "arguments",
    [
        ["train"],
        ["train", "--updates", "3"],
        ["train", "--help"],
        ["plan", "--size", "gpt2", "--batch-size", "8"],
        ["profile", "--out", "a.json"],
        ["generate", "runs/a", "--prompt", "def "],
        ["evaluate", "runs/a"],
        ["export", "runs/a", "model.safetensors"],
        ["bench"],
        ["bench", "throughput", "--turns", "1"],
    ],
    ids=" ".join,
)
def test_a_command_whose_extra_is_absent_names_it_in_one_line(arguments: list[str]):
    done = bare(COMMAND, *arguments)
    extra = "bench" if arguments[0] == "bench" else "train"
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == (
        f"paci: error: paci {arguments[0]} needs the packages pydantic, tokenizers, matplotlib, "
        f"got no pydantic, tokenizers, matplotlib; pip install 'paci-pipeline[{extra}]'\n"
    )


def test_help_lists_what_is_not_installed():
    done = bare(COMMAND, "--help")
    assert (done.returncode, done.stderr) == (0, "")
    assert "schedules" in done.stdout
    assert "pip install 'paci-pipeline[bench]'" in " ".join(done.stdout.split())

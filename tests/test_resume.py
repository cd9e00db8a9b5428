"""Runs that are stopped, killed or broken, and then go on as if nothing had been."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import cli_helpers as cli
import pytest
from cli_helpers import Shop

from paci.train import checkpoint
from paci.train.config import keep_options, load_config

# Checkpoints at 3, 6 and 8. Evaluations drain as well, so they are set apart from them.
PLAN = {"schedule": "gated", "updates": 8, "checkpoint_every": 3, "eval_every": 5, "log_every": 1}
ENDS_S = 20.0  # in which all processes must be gone after one was killed


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Shop:
    return Shop(tmp_path_factory.mktemp("resume"))


@pytest.fixture(scope="module")
def undisturbed(shop: Shop) -> Path:
    out = shop.new("undisturbed")
    shop.train(out=out, **PLAN)
    return out


@pytest.fixture(autouse=True)
def nothing_left_running(shop: Shop) -> Iterator[None]:
    yield
    assert not cli.processes_of(shop.folder)


def gate(out: Path, worker: int = 2, update: int = 3) -> dict[str, str]:
    """Let a worker stop soon after a checkpoint is there."""
    path = out / "checkpoints" / f"update-{update:08d}"
    return {"GATE_WORKER": str(worker), "GATE_AFTER": str(path)}


def interrupted(shop: Shop, out: Path, **options: Any) -> None:
    """A run of this process that was interrupted after its first checkpoint."""
    done = shop.call(*shop.options(out=out, **{**PLAN, **options}), env=gate(out))
    assert done.code == 130
    assert done.error == "paci: error: interrupted"
    assert cli.checkpoints(out) == ["update-00000003"]
    assert not (out / "summary.json").exists()


def copy(folder: Path, to: Path) -> Path:
    shutil.copytree(folder, to)
    return to


def require_equal(out: Path, expected: Path) -> None:
    """As if never stopped: weights, losses, and every row exactly once."""
    assert cli.digest(out) == cli.digest(expected)
    assert cli.rows(out) == cli.rows(expected)
    assert cli.checkpoints(out) == cli.checkpoints(expected)


# --- bit for bit --------------------------------------------------------------------------------


def test_a_run_goes_on_with_any_number_of_processes(shop: Shop, undisturbed: Path):
    stopped = shop.new()
    interrupted(shop, stopped)
    for size in (1, 2, 4):
        out = copy(stopped, shop.new())
        commands = [shop.options(out=out, resume=True, **PLAN)] * size
        if size == 1:
            # The run's own options are enough.
            commands = [["train", "--resume", "--out", str(out)]]
        ends = shop.ranks(commands) if size > 1 else [shop.call(*commands[0])]
        assert [(end.code, end.err) for end in ends] == [(0, "")] * size
        assert f"resumed from {out}" in ends[-1].out
        require_equal(out, undisturbed)


def test_a_run_of_many_processes_goes_on_with_its_own_options(shop: Shop, undisturbed: Path):
    out = shop.new()
    ends = shop.ranks([shop.options(out=out, **PLAN)] * 2, env=gate(out, worker=3))
    assert all(end.code for end in ends)
    # How many processes there are is up to who starts them.
    for rank, end in enumerate(shop.ranks([["train", "--resume", "--out", str(out)]] * 3)):
        assert (end.code, end.err) == (0, ""), rank
    require_equal(out, undisturbed)
    assert cli.summary(out)["num_processes"] == 3


def test_the_cut_is_kept_where_it_followed_from_the_number_of_workers(tmp_path: Path):
    keep_options(load_config(None, {"workers": "6", "seed": "3"}), tmp_path)
    resumed = load_config(None, {"resume": True, "out": str(tmp_path), "workers": "2"})
    assert (resumed.num_stages, resumed.workers, resumed.seed) == (6, 2, 3)
    assert load_config(None, {"resume": True, "out": str(tmp_path)}).workers == 6


@pytest.mark.parametrize(
    "options",
    [
        {"precision": "bf16"},
        {"weights": "stash", "accumulation": 1},
        {"weights": "recompute", "stages": 2},
        {"weights": "double_buffer", "stages": 2},
        {"weights": "pipemare", "accumulation": 1},
        {"weights": "predict", "accumulation": 1, "precision": "bf16"},
        {"schedule": "1f1b", "tokenizer": "bpe:300", "interrupt": False},
        {"codec": "int8:stochastic=all+topk:feedback=all", "stages": 2},
    ],
    ids=lambda options: "-".join(map(str, options.values())),
)
def test_every_kind_of_run_goes_on(shop: Shop, options: dict[str, Any]):
    # A schedule without the gate is stopped by taking away what came after the first checkpoint.
    options = {**PLAN, "keep_checkpoints": 9, **options}
    is_gated = options.pop("interrupt", True)
    expected, out = shop.new(), shop.new()
    shop.train(out=expected, **options)
    if is_gated:
        worker = options.get("stages", 4) - 1
        done = shop.call(*shop.options(out=out, **options), env=gate(out, worker))
        assert done.code == 130
    else:
        copy(expected, out)
        for later in ("update-00000006", "update-00000008"):
            shutil.rmtree(out / "checkpoints" / later)
    shop.train(out=out, resume=True, **options)
    require_equal(out, expected)


def test_a_checkpoint_says_whose_weights_it_holds(undisturbed: Path):
    folder = checkpoint.newest(undisturbed / "checkpoints")
    assert checkpoint.load_stage(folder, 0)["policy_name"] == "lookahead"


def test_a_finished_run_is_left_as_it_is(shop: Shop, undisturbed: Path):
    out = copy(undisturbed, shop.new())
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    done = shop.call("train", "--resume", "--out", out)
    assert (done.code, done.err) == (0, "")
    assert "has all its 8 updates" in done.out
    for path, content in before.items():
        assert path.name == "options.json" or path.read_bytes() == content, path


# --- sudden ends --------------------------------------------------------------------------------


@pytest.mark.parametrize("launcher", ["paci", "torchrun"])
def test_a_killed_worker_ends_the_others_and_the_run_goes_on(
    shop: Shop, undisturbed: Path, launcher: str
):
    out, blocked = shop.new(launcher), shop.folder / f"blocked-{launcher}"
    env = {**gate(out), "GATE_FILE": str(blocked)}
    options = shop.options(out=out, **PLAN)
    if launcher == "paci":
        started = shop.command(*options, "--workers", 4, env=env)
    else:
        started = shop.command(*cli.torchrun(4, options), module="torch.distributed.run", env=env)
    with started as command:
        victim = int(command.wait_for(blocked))
        # Progress is there before the end.
        assert "update 3/8  loss" in command.out
        assert victim in cli.processes_of(out)
        os.kill(victim, signal.SIGKILL)
        done = command.wait(ENDS_S)
        cli.until(lambda: not cli.processes_of(out), ENDS_S)
    assert done.code == 1
    if launcher == "paci":
        assert "Traceback" not in done.err
        last = done.err.splitlines()[-1]
        assert last.startswith("paci: error: all 4 workers must run to the end")
        assert "SIGKILL of rank 2" in last
        assert "--resume" in last
    else:
        root_cause = done.err[done.err.index("Root Cause") :]
        assert "rank      : 2 " in root_cause
        assert "SIGKILL" in root_cause
    assert cli.checkpoints(out) == ["update-00000003"]
    for rank, end in enumerate(shop.ranks([[*options, "--resume"]] * 4)):
        assert (end.code, end.err) == (0, ""), rank
    require_equal(out, undisturbed)


def test_the_others_name_a_worker_that_was_killed(shop: Shop):
    """Without a launcher that would end them first: it is up to the ranks alone."""
    out, blocked = shop.new(), shop.folder / "blocked-alone"
    env = {**gate(out), "GATE_FILE": str(blocked)}

    def kill() -> bool:
        if blocked.exists():
            os.kill(int(blocked.read_text()), signal.SIGKILL)
        return blocked.exists()

    ends = shop.ranks([shop.options(out=out, **PLAN)] * 4, env=env, once=kill, limit_s=ENDS_S)
    assert [end.code for end in ends] == [1, 1, -signal.SIGKILL, 1]
    for rank in (0, 1, 3):
        assert f"paci: error: rank {rank}: " in ends[rank].err
        assert "rank 2" in ends[rank].err
        assert "Traceback" not in ends[rank].err


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_the_launcher_takes_its_workers_along(shop: Shop, number: signal.Signals):
    out, blocked = shop.new(), shop.folder / f"blocked-{number.name}"
    # One worker stops, the other waits for it in a receive.
    env = {**gate(out, worker=1), "GATE_FILE": str(blocked)}
    options = shop.options(out=out, workers=2, stages=2, **PLAN)
    with shop.command(*options, env=env) as command:
        command.wait_for(blocked)
        assert len(cli.processes_of(out)) == 3
        os.kill(command.pid, number)
        done = command.wait(ENDS_S)
        cli.until(lambda: not cli.processes_of(out), ENDS_S)
        done = command.wait()
    assert "Traceback" not in done.err
    if number == signal.SIGKILL:
        assert done.code == -signal.SIGKILL
    else:
        assert done.code == 130
        assert done.error == "paci: error: interrupted"
    assert cli.checkpoints(out) == ["update-00000003"]


def test_a_worker_does_not_outlive_a_launcher_that_is_gone_before_it_is_ready(shop: Shop):
    """Its parent is then another process than the one that started it."""
    env = {"PACI_LAUNCHER_PID": "0", "RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2"}
    with shop.command(*shop.options(out=shop.new()), env=env) as command:
        assert command.wait().code == 1


def test_a_killed_run_of_one_process_goes_on(shop: Shop, undisturbed: Path):
    out, blocked = shop.new(), shop.folder / "blocked-one"
    env = {**gate(out), "GATE_FILE": str(blocked)}
    with shop.command(*shop.options(out=out, **PLAN), env=env) as command:
        os.kill(int(command.wait_for(blocked)), signal.SIGKILL)
        assert command.wait().code == -signal.SIGKILL
    shop.train(out=out, resume=True, **PLAN)
    require_equal(out, undisturbed)


# --- files written whole or not at all ----------------------------------------------------------


def failing(function: Callable[..., Any], at_call: int) -> Callable[..., Any]:
    """``function``, but its call number ``at_call`` fails half-way, as a full disk would."""
    calls = iter(range(1, 1000))

    def call(*args: Any, **kwargs: Any) -> Any:
        if next(calls) == at_call:
            if function.__name__ == "save_file":
                Path(args[1]).write_bytes(b"half")
            raise OSError(28, "No space left on device")
        return function(*args, **kwargs)

    return call


@pytest.mark.parametrize(
    ("place", "at_call"),
    [("save_file", 5), ("save_file", 8), ("_sync", 10), ("os.fsync", 6), ("Path.rename", 2)],
)
def test_a_crash_while_a_checkpoint_is_written_leaves_the_one_before(
    shop: Shop, undisturbed: Path, monkeypatch: pytest.MonkeyPatch, place: str, at_call: int
):
    """Four stages and a manifest are written at updates 3 and 6: the crash is in the second."""
    out = shop.new()
    with monkeypatch.context() as patch:
        owner, _, name = place.rpartition(".")
        target = {"": checkpoint, "os": checkpoint.os, "Path": Path}[owner]
        patch.setattr(target, name, failing(getattr(target, name), at_call))
        crashed = shop.call(*shop.options(out=out, **PLAN))
    assert crashed.code == 1
    assert crashed.error.startswith(
        "paci: error: a checkpoint must be written whole, got 'No space left on device' for "
        f"{out}/checkpoints/"
    )
    assert cli.checkpoints(out) == [".update-00000006", "update-00000003"]
    newest = checkpoint.newest(out / "checkpoints")
    checkpoint.verify(newest, checkpoint.read_manifest(newest))
    assert shop.call("generate", out, "--tokens", 1).code == 0
    shutil.copytree(newest, newest.with_name(".update-00000004"))  # of another crash
    half = newest.with_name(".update-00000006") / ".half"  # of a process that was killed
    half.write_bytes(b"half")
    shop.train(out=out, resume=True, **PLAN)
    require_equal(out, undisturbed)


# `paci` whose files may not be longer than the first stage's is; messages are shorter.
LIMITED = """
import resource
import sys
from paci.cli import main

resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, resource.RLIM_INFINITY))
sys.exit(main())
"""


def test_a_limit_on_file_sizes_ends_the_run_and_leaves_the_checkpoint_before(shop: Shop):
    """The system's own limit, which acts as a full disk does."""
    small = {**PLAN, "batch_size": 4}
    undisturbed, stopped = shop.new(), shop.new()
    shop.train(out=undisturbed, **small)
    interrupted(shop, stopped, **small)
    for workers in (1, 2):
        out = copy(stopped, shop.new())
        options = ["train", "--resume", "--out", str(out), "--workers", str(workers)]
        limited = subprocess.run(
            [sys.executable, "-c", LIMITED, *options],
            env={**os.environ, **shop.env},
            capture_output=True,
            text=True,
            timeout=cli.LIMIT_S,
            check=False,
        )
        assert limited.returncode == 1
        errors = limited.stderr.splitlines()
        assert all(line.startswith("paci: error: ") for line in errors)
        # A line a rank, and the launcher's.
        assert len(errors) == (1 if workers == 1 else 3)
        # The first stage and the last are too long: which rank comes first is not known.
        pending = re.escape(str(out / "checkpoints" / ".update-00000006"))
        message = (
            r"a checkpoint must be written whole, got 'File too large \(os error 27\)' for "
            rf"{pending}/stage-0000[03].safetensors; make room for it \(disk, quota, ulimit -f\), "
            r"then go on with --resume"
        )
        ends = [line for line in errors if re.search(f": {message}$", line)]
        assert len(ends) == workers, errors
        newest = checkpoint.newest(out / "checkpoints")
        assert newest.name == "update-00000003"
        checkpoint.verify(newest, checkpoint.read_manifest(newest))
        shop.train(out=out, resume=True, **small)
        require_equal(out, undisturbed)


def test_a_line_of_metrics_that_was_cut_off_is_written_again(shop: Shop, undisturbed: Path):
    out = shop.new()
    interrupted(shop, out)
    metrics = out / "metrics.jsonl"
    metrics.write_text(metrics.read_text().rstrip("\n") + '\n{"update": 3, "lo')
    shop.train(out=out, resume=True, **PLAN)
    require_equal(out, undisturbed)


def test_a_run_that_ended_before_its_first_checkpoint_starts_again(shop: Shop, undisturbed: Path):
    out = shop.new()
    soon = {"GATE_WORKER": "2", "GATE_AFTER": str(out / "metrics.jsonl")}
    done = shop.call(*shop.options(out=out, **PLAN), env=soon)
    assert done.code == 130
    assert not (out / "checkpoints").exists()
    done = shop.call("train", "--out", out)
    assert "pass --resume" in done.error
    done = shop.call("train", "--resume", "--out", out)
    assert (done.code, done.err) == (0, "")
    assert "no checkpoint yet" in done.out
    require_equal(out, undisturbed)


def test_a_folder_without_a_run_is_not_resumed(shop: Shop):
    out = shop.new()
    out.mkdir()
    assert "must have a checkpoint" in shop.call(*shop.options(out=out, resume=True, **PLAN)).error


def test_time_goes_on_where_it_was(shop: Shop):
    """Elapsed seconds never fall, and what counts from the resumption says so."""
    out = shop.new()
    interrupted(shop, out)
    rows = cli.timed_rows(out)
    shop.call("train", "--resume", "--out", out)
    times = [row["elapsed_s"] for row in cli.timed_rows(out) if "elapsed_s" in row]
    assert times == sorted(times)
    assert times[3] > max(row["elapsed_s"] for row in rows if row["update"] == 3)
    assert cli.summary(out)["resumed_at"] == 3


def test_losses_that_a_drain_makes_known_are_told(shop: Shop):
    """On a long V the last stage is behind: its losses come with the drains of the first updates,
    and later with the step after."""
    more = {"schedule": "paci-v", "stages": 8, "layers": 6, "accumulation": 8, "updates": 10}
    out = shop.new()
    shop.train(out=out, log_every=1, eval_every=5, flush_first=0.3, **more)
    told = [row["update"] for row in cli.rows(out) if "loss" in row]
    assert told[:3] == [1, 2, 3]
    assert told[-1] == 10
    assert sorted(set(told)) == told

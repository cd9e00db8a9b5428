"""How the tests use ``paci``: in this process, as commands, and as ranks of a job.

Ranks are forked from a server that has imported torch already, with the environment that torchrun
would give them; the test keeps the store at which they meet. Commands are real processes, each in
a session of its own that is killed when the test is through with it.
"""

from __future__ import annotations

import contextlib
import functools
import io
import json
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch.distributed as dist

from paci.cli import main

LIMIT_S = 150.0  # longest that any process may take; a bound against hanging, never reached

TEXT = "the pipeline never waits for a stage whose weights drift and update"
# A small model; `data` is added by `Shop`.
SMALL = {
    "layers": 4,
    "heads": 2,
    "width": 32,
    "context": 32,
    "batch_size": 16,
    "updates": 4,
    "stages": 4,
    "accumulation": 2,
    "dropout": 0.1,
    "eval_sequences": 4,
    "sample_tokens": 0,
    "timeout": 60,
}
# PACI's program, but the worker that GATE_WORKER names stops for ever (or interrupts the process)
# at its first update once the path in GATE_AFTER exists. It leaves its process id in GATE_FILE.
GATED = """
import os
import signal
import time
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from paci.schedule.action import Kind
from paci.schedule.paci import PACI


@dataclass(frozen=True)
class Gated(PACI):
    name: ClassVar[str] = "gated"
    summary: ClassVar[str] = "PACI with a gate"

    def program(self, worker):
        for action in super().program(worker):
            yield action
            if action.kind is Kind.UPDATE and os.environ.get("GATE_WORKER") == str(worker):
                if Path(os.environ["GATE_AFTER"]).exists():
                    if "GATE_FILE" not in os.environ:
                        raise KeyboardInterrupt
                    part = Path(os.environ["GATE_FILE"] + ".part")
                    part.write_text(str(os.getpid()))
                    part.rename(os.environ["GATE_FILE"])
                    while True:
                        time.sleep(1)
"""


@dataclass(frozen=True)
class Done:
    """How a command ended."""

    code: int
    out: str
    err: str

    @property
    def error(self) -> str:
        """The one line on stderr."""
        assert "Traceback" not in self.err, self.err
        (line,) = self.err.splitlines()
        assert line.startswith("paci: error: "), line
        return line


class Command:
    """A running process, its session, and what it has printed so far."""

    def __init__(self, arguments: Sequence[str], folder: Path, env: Mapping[str, str]) -> None:
        self._files = [folder / f"{name}-{time.monotonic_ns()}" for name in ("out", "err")]
        with self._files[0].open("w") as out, self._files[1].open("w") as err:
            self._process = subprocess.Popen(
                arguments, stdout=out, stderr=err, env=dict(env), start_new_session=True
            )
        self.pid = self._process.pid

    @property
    def out(self) -> str:
        return self._files[0].read_text(errors="replace")

    @property
    def err(self) -> str:
        return self._files[1].read_text(errors="replace")

    def wait(self, limit_s: float = LIMIT_S) -> Done:
        try:
            code = self._process.wait(limit_s)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"must end, got none after {limit_s} s:\n{self.err}") from None
        return Done(code, self.out, self.err)

    def wait_for(self, path: Path) -> str:
        """Wait for a file that the process makes; return what is in it."""
        until(lambda: path.exists() or self._process.poll() is not None)
        assert path.exists(), f"ended with {self._process.poll()}:\n{self.out}\n{self.err}"
        return path.read_text()

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        self._process.wait()


class Shop:
    """A folder with a corpus, a cache and a schedule, where runs are made."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.corpus = folder / "text"
        write_corpus(self.corpus)
        schedules = folder / "schedules"
        schedules.mkdir()
        (schedules / "gated.py").write_text(GATED)
        self.env = {"PACI_CACHE": str(folder / "cache"), "PACI_SCHEDULE_PATH": str(schedules)}
        self._num_names = 0

    def new(self, name: str = "run") -> Path:
        """The path of a run folder that does not exist yet."""
        self._num_names += 1
        return self.folder / f"{name}-{self._num_names}"

    def options(self, **options: Any) -> list[str]:
        """A command line of ``paci train`` for a small run."""
        return ["train", *flags({"data": self.corpus, **SMALL, **options})]

    def call(self, *arguments: object, env: Mapping[str, str] | None = None) -> Done:
        """Run ``paci ARGUMENTS`` in this process."""
        out, err = io.StringIO(), io.StringIO()
        with (
            mock.patch.dict(os.environ, {**self.env, **(env or {})}),
            contextlib.redirect_stdout(out),
            contextlib.redirect_stderr(err),
        ):
            code = main([str(argument) for argument in arguments])
        return Done(code, out.getvalue(), err.getvalue())

    def train(self, env: Mapping[str, str] | None = None, **options: Any) -> dict[str, Any]:
        """Train in this process, in a new folder unless ``out`` is given; return the summary."""
        out = options.setdefault("out", self.new())
        done = self.call(*self.options(**options), env=env)
        assert done.code == 0, done.err
        assert done.err == ""
        return summary(out)

    def train_ranks(self, num_ranks: int, **options: Any) -> dict[str, Any]:
        """Train with as many processes; return the summary."""
        out = options.setdefault("out", self.new())
        for rank, done in enumerate(self.ranks([self.options(**options)] * num_ranks)):
            assert (done.code, done.err) == (0, ""), f"rank {rank}: {done.err}"
        return summary(out)

    def ranks(
        self,
        commands: Sequence[Sequence[str]],
        env: Mapping[str, str] | None = None,
        once: Callable[[], bool] = lambda: True,
        limit_s: float = LIMIT_S,
    ) -> list[Done]:
        """Run the command lines as the ranks of one job.

        All are killed if one is there ``limit_s`` after ``once`` has become true.
        """
        logs = self.new("logs")
        logs.mkdir()
        store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        job = {
            **self.env,
            **(env or {}),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(store.port),
            "WORLD_SIZE": str(len(commands)),
            "TORCHELASTIC_USE_AGENT_STORE": "True",
            "TORCHELASTIC_RESTART_COUNT": "0",
        }
        processes = [
            _fork_server().Process(target=_rank, args=(rank, job, list(command), logs), daemon=True)
            for rank, command in enumerate(commands)
        ]
        for process in processes:
            process.start()
        try:
            until(once)
            until(lambda: all(process.exitcode is not None for process in processes), limit_s)
        finally:
            for process in processes:
                process.kill()
                process.join()
        return [
            Done(
                process.exitcode,
                (logs / f"{rank}.out").read_text(errors="replace"),
                (logs / f"{rank}.err").read_text(errors="replace"),
            )
            for rank, process in enumerate(processes)
        ]

    @contextlib.contextmanager
    def command(
        self, *arguments: object, module: str = "paci", env: Mapping[str, str] | None = None
    ) -> Iterator[Command]:
        """Start ``python -m MODULE ARGUMENTS``; whatever is left of it is killed at the end."""
        command = Command(
            [sys.executable, "-m", module, *(str(argument) for argument in arguments)],
            self.folder,
            {**os.environ, **self.env, **(env or {})},
        )
        try:
            yield command
        finally:
            command.kill()
            for argument in arguments:
                if str(argument).startswith(str(self.folder)):
                    for pid in processes_of(argument):
                        with contextlib.suppress(ProcessLookupError):
                            os.kill(pid, signal.SIGKILL)


def flags(options: Mapping[str, Any]) -> list[str]:
    """``{"batch_size": 4, "resume": True, "size": None}`` as ``--batch-size 4 --resume``."""
    found = []
    for name, value in options.items():
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            found.append(f"--{flag}" if value else f"--no-{flag}")
        elif value is not None:
            found += [f"--{flag}", str(value)]
    return found


def torchrun(num_ranks: int, arguments: Sequence[str]) -> list[str]:
    """Arguments of torchrun (module ``torch.distributed.run``) that start paci."""
    return ["--standalone", "--nproc-per-node", str(num_ranks), "-m", "paci", *arguments]


def write_corpus(folder: Path, num_files: int = 20, num_words: int = 200) -> None:
    draw = random.Random(0)
    words = TEXT.split()
    folder.mkdir()
    for i in range(num_files):
        text = " ".join(draw.choice(words) for _ in range(num_words))
        (folder / f"{i}.txt").write_text(text + "\n")


def summary(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "summary.json").read_text())


def digest(folder: Path) -> str:
    return summary(folder)["weights_sha256"]


def rows(folder: Path) -> list[dict[str, Any]]:
    """The rows of ``metrics.jsonl`` without what depends on time."""
    clock = {"elapsed_s", "tokens_per_s", "utilization", "max_drift"}
    return [{k: v for k, v in row.items() if k not in clock} for row in timed_rows(folder)]


def timed_rows(folder: Path) -> list[dict[str, Any]]:
    """The rows of ``metrics.jsonl``."""
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def checkpoints(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "checkpoints").iterdir())


def until(condition: Callable[[], bool], limit_s: float = LIMIT_S) -> None:
    end_s = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < end_s, f"must come within {limit_s} s"
        time.sleep(0.02)


def processes_of(marker: object) -> list[int]:
    """Processes with ``marker`` in their command line, except this one and those that ended."""
    if not Path("/proc/self").exists():
        listed = subprocess.run(
            ["ps", "-axww", "-o", "pid=,stat=,command="], capture_output=True, text=True, check=True
        )
        rows = [line.split(None, 2) for line in listed.stdout.splitlines()]
        found = [int(row[0]) for row in rows if row[1][0] != "Z" and str(marker) in row[-1]]
        return [pid for pid in found if pid != os.getpid()]
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            state = (entry / "stat").read_text().rpartition(")")[2].split()[0]
            if str(marker) in (entry / "cmdline").read_text(errors="replace") and state != "Z":
                found.append(int(entry.name))
    return [pid for pid in found if pid != os.getpid()]


@functools.cache
def _fork_server() -> Any:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__, "paci.train.run", "paci.train.launch"])
    return context


def _rank(rank: int, job: Mapping[str, str], arguments: list[str], logs: Path) -> None:
    """What a forked rank does; it ends as ``python -m paci`` would."""
    for number, name in ((1, "out"), (2, "err")):
        file = os.open(logs / f"{rank}.{name}", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(file, number)
    os.environ.update(job, RANK=str(rank), LOCAL_RANK=str(rank))
    sys.exit(main(arguments))

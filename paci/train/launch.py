"""Start the processes of a run on this host, with PyTorch's own elastic launcher.

What ``torchrun --standalone`` does; for several hosts use torchrun itself.
"""

from __future__ import annotations

import logging
import os
import signal
import socket
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Sequence

from torch.distributed.elastic.multiprocessing.api import DefaultLogsSpecs, SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from paci.errors import ConfigError, WorkerError

# Set for the processes that `launch` starts, to the process that started them.
LAUNCHER_VARIABLE = "PACI_LAUNCHER_PID"


def launch(arguments: Sequence[str], num_workers: int, port: int) -> None:
    """Run ``python -m paci ARGUMENTS`` in ``num_workers`` processes and wait for them.

    When one of them fails the others are ended.

    Args:
        arguments: of the command line, the same for each process.
        num_workers: how many.
        port: where they meet on this host; 0 for any free port.

    Raises:
        ConfigError: the port is taken.
        WorkerError: a process failed; names the first one.
    """
    _require_free(port)
    # It logs tracebacks of its own, and so does TCPStore when the launcher is killed; one line from
    # the process that failed says what matters.
    for name in list(logging.root.manager.loggerDict):
        if name.startswith("torch.distributed.elastic"):
            logging.getLogger(name).setLevel(logging.CRITICAL)
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ[LAUNCHER_VARIABLE] = str(os.getpid())
    try:
        with tempfile.TemporaryDirectory(prefix="paci-") as folder:
            _run(_config(num_workers, port, folder), arguments)
    finally:
        del os.environ[LAUNCHER_VARIABLE]


def _config(num_workers: int, port: int, folder: str) -> LaunchConfig:
    """Args: ``folder`` takes what the elastic launcher writes for itself."""
    return LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=num_workers,
        run_id=uuid.uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint=f"localhost:{port}",
        max_restarts=0,
        monitor_interval=0.2,
        logs_specs=DefaultLogsSpecs(log_dir=folder),
    )


def _run(config: LaunchConfig, arguments: Sequence[str]) -> None:
    try:
        elastic_launch(config, sys.executable)("-m", "paci", *arguments)
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        remedy = "its message above says why"
        if failure.exitcode < 0:
            remedy = "go on with --resume from the last checkpoint"
        raise WorkerError(
            f"all {config.nproc_per_node} workers must run to the end, got "
            f"{_how_it_ended(failure.exitcode)} of rank {rank}; {remedy}"
        ) from error
    except SignalException as error:
        raise KeyboardInterrupt from error


def is_launched() -> bool:
    """Whether ``launch`` started this process."""
    return LAUNCHER_VARIABLE in os.environ


def end_with_launcher() -> None:
    """In a process that ``launch`` started: end it when the launcher is gone, whatever happens."""

    def watch() -> None:
        while str(os.getppid()) == os.environ[LAUNCHER_VARIABLE]:
            time.sleep(1.0)
        os._exit(1)

    if is_launched():
        threading.Thread(target=watch, name="paci-launcher", daemon=True).start()


def _how_it_ended(exit_code: int) -> str:
    if exit_code < 0:
        return f"the death by {signal.Signals(-exit_code).name}"
    return f"exit code {exit_code}"


def _require_free(port: int) -> None:
    if not port:
        return
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("localhost", port))
        except OSError as error:
            raise ConfigError(
                f"port must be free, got {port}: {error.strerror}; pass another --port, or 0 for "
                f"any free one"
            ) from error

"""Waiting for a process that works alone: as long as it is heard, and no longer."""

from __future__ import annotations

import threading
import time

import pytest
import torch.distributed as dist

from paci.errors import WorkerError
from paci.train import alone


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> dist.Store:
    monkeypatch.setattr(alone, "_BEAT_S", 0.02)
    return dist.HashStore()


def test_who_is_heard_is_waited_for_beyond_the_time_out(store: dist.Store):
    def work() -> None:
        with alone.heard(store, 3):
            time.sleep(1.0)

    thread = threading.Thread(target=work)
    thread.start()
    started = time.monotonic()
    alone.wait_until_done(store, 3, timeout_s=0.3)
    assert time.monotonic() - started > 0.6
    thread.join()


def test_who_is_silent_is_not_waited_for(store: dist.Store):
    with pytest.raises(WorkerError, match=r"rank 3 must prepare .* for 0\.1 s; look at its log"):
        alone.wait_until_done(store, 3, timeout_s=0.1)


def test_work_that_fails_keeps_nobody_waiting(store: dist.Store):
    with pytest.raises(ValueError, match="mine"), alone.heard(store, 0):
        raise ValueError("mine")
    alone.wait_until_done(store, 0, timeout_s=0.0)

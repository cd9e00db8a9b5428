"""What a run tells while it goes: lines of progress, ``metrics.jsonl``, TensorBoard."""

from __future__ import annotations

import importlib.util
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from paci.errors import ConfigError, PaciError

METRICS_FILE = "metrics.jsonl"


class Metrics:
    """Appends rows to ``metrics.jsonl`` (and to TensorBoard), each with its ``update``.

    Args:
        folder: the run's.
        from_update: rows of later updates are dropped: a run that is resumed there will write
            them again.
        tensorboard: also write events.

    Attributes:
        elapsed_s: seconds of training that the rows tell of which were there.

    Raises:
        ConfigError: TensorBoard is asked for and not installed.
    """

    def __init__(self, folder: Path, from_update: int, tensorboard: bool) -> None:
        self._board = _board(folder, from_update) if tensorboard else None
        self._path = folder / METRICS_FILE
        kept = [row for row in read_metrics(self._path) if row["update"] <= from_update]
        self.elapsed_s = max((row.get("elapsed_s", 0.0) for row in kept), default=0.0)
        partial = self._path.with_suffix(".partial")
        partial.write_text("".join(json.dumps(row) + "\n" for row in kept), encoding="utf-8")
        os.replace(partial, self._path)
        self._file = self._path.open("ab", buffering=0)

    def write(self, row: Mapping[str, Any]) -> None:
        """Append one row.

        Raises:
            PaciError: the row cannot be written whole.
        """
        left = memoryview(json.dumps(row).encode() + b"\n")
        try:
            while left:
                left = left[self._file.write(left) :]
        except OSError as error:
            raise PaciError(
                f"{self._path} must be written whole, got {error.strerror!r}; make room for it "
                f"(disk, quota, ulimit -f), then go on with --resume"
            ) from error
        if self._board is not None:
            for key, value in row.items():
                if key != "update" and value is not None:
                    self._board.add_scalar(key, value, row["update"])

    def close(self) -> None:
        """Close the files."""
        self._file.close()
        if self._board is not None:
            self._board.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The rows of a ``metrics.jsonl``; a last line that was cut off is left out."""
    if not path.exists():
        return []
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            rows.append(json.loads(line))
        except ValueError:
            break
    return rows


def require_tensorboard() -> None:
    """Raise ``ConfigError`` unless TensorBoard is installed."""
    if importlib.util.find_spec("tensorboard") is None:
        raise ConfigError(
            "tensorboard must be installed to write its events, got no such package; pip install "
            "'paci-pipeline[tensorboard]', or leave --tensorboard out"
        )


def _board(folder: Path, from_update: int) -> Any:
    require_tensorboard()
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(folder / "tensorboard", purge_step=from_update + 1)


def format_duration(seconds: float) -> str:
    """``75`` as ``1:15``, ``3675`` as ``1:01:15``."""
    minutes, second = divmod(round(seconds), 60)
    hour, minute = divmod(minutes, 60)
    return f"{hour}:{minute:02d}:{second:02d}" if hour else f"{minute}:{second:02d}"

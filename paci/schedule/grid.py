"""A schedule as text: a row for each stage, a column for each unit of time."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from paci.schedule.action import Action, Kind
from paci.schedule.base import Schedule
from paci.schedule.sequence import Sequencer

LEGEND = "F forward, B backward, I input backward, W weight backward, * update"


def render(
    columns: Iterable[Sequence[Action]], schedule: Schedule, culprit: Action | None = None
) -> str:
    """Draw columns of actions; an action equal to ``culprit`` stands between ``>`` and ``<``."""
    rows: list[list[str]] = [[] for _ in range(schedule.num_stages)]
    for width, column in enumerate(columns, start=1):
        for action in column:
            if not 0 <= action.stage < schedule.num_stages:
                continue
            row = rows[action.stage]
            row.extend([""] * (width - len(row)))
            if action.kind is Kind.UPDATE and action != culprit:
                row[-1] += "*"
                continue
            cell = f"{action.kind.value}{action.micro_batch}"
            row[-1] += f">{cell}<" if action == culprit else cell
    span = max((len(row) for row in rows), default=0)
    cell_width = max((len(cell) for row in rows for cell in row), default=0) + 1
    lines = []
    for stage, row in enumerate(rows):
        cells = "".join(cell.ljust(cell_width) for cell in row + [""] * (span - len(row)))
        label = f"stage {stage} (worker {schedule.worker_of(stage)})"
        lines.append(f"{label:<22}{cells}".rstrip())
    return "\n".join(lines)


def draw(schedule: Schedule, num_updates: int) -> str:
    """The grid of ``num_updates`` updates from an empty pipeline to an empty pipeline."""
    sequencer = Sequencer(schedule)
    sequencer.feed(num_updates * schedule.accumulation)
    sequencer.drain()
    return render(sequencer.columns(), schedule) + f"\n{LEGEND}"

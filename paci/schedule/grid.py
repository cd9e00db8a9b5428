"""Draw a schedule as text: a row for each stage, a column for each unit of time."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from paci.schedule.action import Action, Kind
from paci.schedule.base import Schedule
from paci.schedule.sequence import Sequencer

LEGEND = "F forward, B backward, I input backward, W weight backward, * update"


def render(
    columns: Iterable[Sequence[Action]],
    schedule: Schedule,
    culprit: Action | None = None,
    waiting: Sequence[Action] = (),
) -> str:
    """Return a text that shows columns of actions, with a row for each stage.

    Args:
        columns: the actions of each column.
        schedule: the schedule that the actions belong to.
        culprit: an action to mark: the last one that equals it stands between ``>`` and ``<``.
        waiting: actions that could not run, drawn in brackets in a last column.
    """
    cells = [(width, action) for width, column in enumerate(columns) for action in column]
    num_columns = cells[-1][0] + 1 if cells else 0
    cells += [(num_columns, action) for action in waiting]
    marked = max((i for i, (_, action) in enumerate(cells) if action == culprit), default=-1)
    rows: dict[int, list[str]] = {stage: [] for stage in range(schedule.num_stages)}
    for i, (column, action) in enumerate(cells):
        row = rows.setdefault(action.stage, [])
        row.extend([""] * (column + 1 - len(row)))
        cell = f"{action.kind.value}{action.micro_batch}"
        if i == marked:
            row[-1] += f">{cell}<"
        elif column == num_columns:
            row[-1] += f"({cell})"
        else:
            row[-1] += "*" if action.kind is Kind.UPDATE else cell
    cell_width = max((len(cell) for row in rows.values() for cell in row), default=0) + 1
    lines = []
    for stage, row in sorted(rows.items()):
        known = 0 <= stage < schedule.num_stages
        worker = f"worker {schedule.worker_of(stage)}" if known else "no such stage"
        drawn = "".join(cell.ljust(cell_width) for cell in row)
        lines.append(f"{f'stage {stage} ({worker})':<22}{drawn}".rstrip())
    return "\n".join(lines)


def draw(schedule: Schedule, num_updates: int) -> str:
    """Return the grid of ``num_updates`` updates, from an empty pipeline to an empty one."""
    sequencer = Sequencer(schedule)
    sequencer.feed(num_updates * schedule.accumulation)
    sequencer.drain()
    return render(sequencer.columns(), schedule) + f"\n{LEGEND}"

"""What is refused, and how: arguments, names, files, and one broken program for each rule."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest

from paci.errors import ConfigError, ScheduleError
from paci.schedule.action import Action, Kind
from paci.schedule.base import Schedule
from paci.schedule.check import check
from paci.schedule.gpipe import GPipe
from paci.schedule.paci import PACI
from paci.schedule.versions import analyse

F, B, I, W, U = Kind  # noqa: E741


# Programs that break a rule

Edit = Callable[[Iterator[Action]], Iterable[Action]]
Change = tuple[tuple[Kind, int], list[tuple[Kind, int]]]


@dataclass(frozen=True)
class Broken(PACI):
    """PACI, but for the programs that ``edits`` changes; ``roomy`` states a cap of its own."""

    edits: tuple[tuple[int, Edit], ...] = ()
    roomy: int = 0

    def in_flight_cap(self, stage: int) -> int:
        return self.roomy or super().in_flight_cap(stage)

    def program(self, worker: int) -> Iterator[Action]:
        actions = super().program(worker)
        for edited, edit in self.edits:
            if edited == worker:
                actions = iter(edit(actions))
        return actions


def replace(*changes: Change, stage: int) -> Edit:
    """Write other actions of the same stage in the place of some."""
    table = dict(changes)

    def edit(actions: Iterator[Action]) -> Iterator[Action]:
        for action in actions:
            key = (action.kind, action.micro_batch)
            for kind, j in table.get(key, [key]):
                yield Action(kind, stage, j)

    return edit


def broken(stage: int, *changes: Change, n: int = 3, roomy: int = 0) -> Broken:
    return Broken(n, 2, edits=((stage, replace(*changes, stage=stage)),), roomy=roomy)


def refused(schedule: Schedule, problem: str, culprit: str | None, **options: Any) -> str:
    """Check that ``schedule`` is refused; return the row of the grid that holds the culprit."""
    with pytest.raises(ScheduleError, match=problem) as caught:
        check(schedule, **options)
    assert isinstance(caught.value, ConfigError)
    assert caught.value.exit_code == 2
    first, *grid, legend = str(caught.value).splitlines()
    assert "is not legal: " in first
    assert first.endswith("; mend its program")
    assert "> < the culprit" in legend
    assert [line.split(" (")[0] for line in grid] == [f"stage {s}" for s in range(len(grid))]
    assert len(grid) == schedule.num_stages
    rows = [line for line in grid if ">" in line]
    if culprit is None:
        assert not rows
        return ""
    assert len(rows) == 1
    assert f">{culprit}<" in rows[0]
    return rows[0]


def test_the_edited_schedule_is_legal_without_edits():
    check(Broken(3, 2))
    check(broken(1, ((F, 0), [(F, 0)])))


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ([((F, 2), [(F, 2), (F, 2)])], "exactly once, got FORWARD after FORWARD"),
        ([((F, 3), [(F, 2)])], "exactly once, got FORWARD after FORWARD"),
    ],
)
def test_a_forward_twice(changes: Any, problem: str):
    row = refused(broken(0, *changes), problem, "F2")
    assert row.startswith("stage 0 (worker 0)")


@pytest.mark.parametrize(
    ("second", "problem"),
    [
        (B, "exactly once, got BACKWARD after BACKWARD"),
        (I, "exactly once, got BACKWARD_INPUT after BACKWARD"),
        (W, "exactly once, got BACKWARD_WEIGHT after BACKWARD"),
    ],
)
def test_a_backward_twice(second: Kind, problem: str):
    refused(broken(2, ((B, 0), [(B, 0), (second, 0)])), problem, f"{second.value}0")


def test_a_whole_backward_after_its_input_half():
    schedule = broken(2, ((B, 0), [(I, 0), (B, 0)]))
    refused(schedule, "exactly once, got BACKWARD after BACKWARD_INPUT", "B0")


def test_a_weight_backward_before_its_input_backward():
    schedule = broken(2, ((B, 0), [(W, 0), (I, 0)]))
    refused(schedule, "a weight backward must follow its input backward", "W0")


def test_a_backward_before_its_forward():
    schedule = broken(2, ((F, 1), [(B, 1)]), ((B, 1), [(F, 1)]))
    row = refused(schedule, "a backward must follow its forward", "B1")
    assert re.search(r"F0 +B0 +>B1<$", row)


@pytest.mark.parametrize("left", [[], [(I, 2)]])
def test_a_missing_backward_or_half_of_one(left: list[tuple[Kind, int]]):
    schedule = broken(0, ((B, 2), left), n=1, roomy=9)
    row = refused(schedule, r"update 1 must apply .* 2 to 3 .*got gradients of \[3\]", "U3")
    assert re.search(r"B3 +>U3<$", row)


def test_a_missing_backward_is_noticed_at_the_update():
    schedule = broken(0, ((B, 2), []), roomy=9)
    refused(schedule, r"update 1 must apply .* 2 to 3 .*got gradients of \[3\]", "U3")


def test_a_missing_backward_stays_in_flight():
    schedule = broken(0, ((B, 2), []))
    refused(schedule, "in flight must be at most 3 micro-batches, got 4", "F5")


def test_a_missing_forward():
    for stage in (0, 2):
        schedule = broken(stage, ((F, 2), []))
        refused(schedule, "a backward must follow its forward", "B2")


def test_a_micro_batch_below_0():
    schedule = broken(0, ((F, 0), [(F, -1), (F, 0)]), n=1, roomy=9)
    refused(schedule, "micro-batches count from 0", "F-1")


def test_an_update_too_early():
    schedule = broken(1, ((B, 1), [(U, 1), (B, 1)]), ((U, 1), []))
    refused(schedule, r"update 0 must apply .* 0 to 1 .*got gradients of \[0\]", "U1")


def test_an_update_too_late():
    schedule = broken(1, ((U, 1), []), ((B, 2), [(B, 2), (U, 1)]))
    row = refused(schedule, "belongs to update 1, got it while update 0 accumulates", "B2")
    assert row.startswith("stage 1")


def test_an_update_with_the_wrong_micro_batch():
    schedule = broken(1, ((U, 1), [(U, 0)]))
    refused(schedule, r"carry the last of them, got gradients of \[0, 1\]", "U0")


def test_an_update_too_many():
    schedule = broken(1, ((U, 1), [(U, 1), (U, 1)]))
    refused(schedule, r"update 1 must apply micro-batches 2 to 3 .*got gradients of \[\]", "U1")


@pytest.mark.parametrize("wrong", [0, 2])
def test_an_action_of_a_stage_that_is_elsewhere(wrong: int):
    def edit(actions: Iterator[Action]) -> Iterator[Action]:
        return (a._replace(stage=wrong) if a[::2] == (F, 2) else a for a in actions)

    schedule = Broken(3, 2, edits=((1, edit),))
    row = refused(schedule, r"worker 1 holds stages \(1,\) and must act on no other", "F2")
    assert row.startswith(f"stage {wrong}")


@pytest.mark.parametrize("wrong", [-1, 3])
def test_an_action_of_a_stage_that_does_not_exist(wrong: int):
    def edit(actions: Iterator[Action]) -> Iterator[Action]:
        return (a._replace(stage=wrong) if a[::2] == (F, 2) else a for a in actions)

    problem = rf"FORWARD\(2\) at stage {wrong}: worker 1 holds stages \(1,\)"
    with pytest.raises(ScheduleError, match=problem):
        check(Broken(3, 2, edits=((1, edit),)))


# Deadlocks and queues


def test_two_orders_that_cross_are_a_deadlock():
    """Stage 1 of GPipe wants both forwards first; stage 0 of 1F1B wants the gradient between."""

    def one_by_one(_: Iterator[Action]) -> Iterator[Action]:
        for j in itertools.count():
            yield from (Action(F, 0, j), Action(B, 0, j))
            if j % 2:
                yield Action(U, 0, j)

    def both_first(_: Iterator[Action]) -> Iterator[Action]:
        for j in itertools.count(0, 2):
            yield from (Action(kind, 1, k) for kind in (F, B) for k in (j, j + 1))
            yield Action(U, 1, j + 1)

    schedule = Broken(2, 2, edits=((0, one_by_one), (1, both_first)), roomy=9)
    problem = r"no worker can move any more: each waits for another \(BACKWARD\(0\) at stage 0; "
    row = refused(schedule, problem + r"FORWARD\(1\) at stage 1\)", "B0")
    assert re.search(r"F0 +>B0<$", row)


def test_channels_too_small_for_the_slack_are_a_deadlock():
    """Stage 0 sends four before it takes a gradient; with room for one each way both stop."""
    schedule = PACI(2, 2, slack=2)
    check(schedule)
    check(schedule, capacity=2)
    problem = r"can move any more: .* \(FORWARD\(3\) at stage 0; BACKWARD\(1\) at stage 1\)"
    row = refused(schedule, problem, "F3", capacity=1)
    assert row.startswith("stage 0")
    refused(schedule, "no worker can move any more", "F0", capacity=0)


@pytest.mark.parametrize("kind", [F, B])
def test_a_channel_is_a_queue(kind: Kind):
    """A neighbour that takes the second message before the first."""

    class Swapped(GPipe):
        def program(self, worker: int) -> Iterator[Action]:
            actions = super().program(worker)
            taker = 1 if kind is F else 0
            if worker != taker:
                return actions
            swap = {0: 1, 1: 0}
            return (
                a._replace(micro_batch=swap.get(a.micro_batch, a.micro_batch))
                if a.kind is kind
                else a
                for a in actions
            )

    check(GPipe(2, 2))
    message = {F: "activation", B: "gradient"}[kind]
    problem = f"its {message} must be the next in line, got that of 0"
    refused(Swapped(2, 2), problem, f"{kind.value}1")


# Stated bounds


def stating(base: type[Schedule], **members: Any) -> Any:
    """A schedule that says something else about itself."""
    return dataclass(frozen=True)(type("Stating", (base,), members))


def test_drift_above_the_stated_bound():
    schedule = stating(PACI, drift_bound=lambda self, stage: 0)(3, 2)
    refused(schedule, r"drift must be at most 0, got 1 \(micro-batch 2\)", "U3")
    check(stating(PACI, drift_bound=lambda self, stage: 1)(3, 2))


def test_more_in_flight_than_the_stated_cap():
    def cap(self: PACI, stage: int) -> int:
        return 2

    row = refused(stating(PACI, in_flight_cap=cap)(3, 2), "at most 2 micro-batches, got 3", "F2")
    assert row.startswith("stage 0")
    check(stating(PACI, in_flight_cap=lambda self, stage: 3)(3, 2))


def test_a_flush_that_is_not_empty():
    schedule = stating(PACI, flushes=True)(3, 2)
    row = refused(schedule, r"a flush must leave nothing in flight, got \[2, 3\]", "U1")
    assert row.startswith("stage 0")
    check(stating(PACI, flushes=True)(1, 2))


# Programs without an end, or with one


def test_a_program_that_ends():
    schedule = Broken(2, 2, edits=((1, lambda actions: itertools.islice(actions, 7)),))
    with pytest.raises(ScheduleError, match=r"must go on .* got the end of .* at worker 1; let it"):
        check(schedule)
    check(Broken(2, 2, edits=((1, lambda actions: itertools.islice(actions, 10)),)), num_updates=2)


def test_a_program_that_never_updates():
    schedule = Broken(2, 2, edits=((0, lambda actions: (a for a in actions if a.kind is not U)),))
    refused(schedule, "its gradient belongs to update 1, got it while update 0 accumulates", "B2")
    with pytest.raises(
        ScheduleError, match=r"must update every stage .* at worker 0; yield UPDATE"
    ):
        check(schedule, num_updates=1)


def test_a_program_that_does_not_count():
    """It would go on for ever: noticed at the first repetition."""
    again = lambda actions: itertools.cycle([Action(F, 0, 0), Action(B, 0, 0)])  # noqa: E731
    refused(Broken(1, 2, edits=((0, again),)), "must happen exactly once", "F0")


def test_a_duplicate_is_marked_where_it_is_one_too_many():
    row = refused(broken(1, ((F, 2), [(F, 2), (F, 2)]), roomy=9), "must happen exactly once", "F2")
    assert re.search(r"F2 +>F2<$", row)


def test_what_waits_in_a_deadlock_stands_in_brackets():
    with pytest.raises(ScheduleError, match=r">[FB]\d+<") as caught:
        check(PACI(4, 2, slack=2), capacity=1)
    assert re.search(r"\([FB]\d+\)$", str(caught.value), re.MULTILINE)


def test_a_deadlock_cannot_be_analysed():
    def crossed(actions: Iterator[Action]) -> Iterator[Action]:
        yield Action(B, 0, 0)
        yield Action(F, 0, 0)

    with pytest.raises(ScheduleError, match="must run to its end to be analysed"):
        analyse(Broken(2, 2, edits=((0, crossed),)), 1)


# Placements


@pytest.mark.parametrize(
    "placement",
    [
        ((0,), (), (1,), (2,)),
        ((0,), (1,)),
        ((0,), (1,), (1, 2)),
        ((0,), (1,), (2,), (3,)),
        ((0,), (1,), (3,)),
        (),
    ],
)
def test_a_placement_that_is_none(placement: Any):
    schedule = stating(PACI, placement=property(lambda self: placement))(3, 2)
    with pytest.raises(
        ScheduleError, match="each of 3 stages once and leave no worker empty"
    ) as it:
        check(schedule)
    assert f"got {placement}; mend" in str(it.value)

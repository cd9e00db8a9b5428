"""Schedules drawn as text, compared with what was checked by eye."""

from __future__ import annotations

import sys

import pytest

from paci.schedule.action import Kind
from paci.schedule.base import Schedule
from paci.schedule.gpipe import GPipe
from paci.schedule.grid import LEGEND, draw
from paci.schedule.one_f_one_b import OneFOneBFlush
from paci.schedule.paci import PACI
from paci.schedule.paci_v import PaciV
from paci.schedule.sequence import Sequencer

U = Kind.UPDATE


# Golden grids


def golden(text: str) -> str:
    return "\n".join(line.rstrip() for line in text.strip("\n").splitlines()) + f"\n{LEGEND}"


def test_grid_of_paci():
    assert draw(PACI(3, 2), 2) == golden("""
stage 0 (worker 0)    F0  F1  F2          B0  F3  B1*     B2      B3*
stage 1 (worker 1)        F0  F1      B0  F2  B1* F3  B2      B3*
stage 2 (worker 2)            F0  B0  F1  B1* F2  B2  F3  B3*
""")


def test_grid_of_paci_with_split_backward():
    assert draw(PACI(3, 2, split_backward=True), 2) == golden("""
stage 0 (worker 0)    F0  F1  F2          B0  F3      B1*         B2          B3*
stage 1 (worker 1)        F0  F1      I0  W0  F2  I1  W1* F3  I2  W2      I3  W3*
stage 2 (worker 2)            F0  I0  W0  F1  I1  W1* F2  I2  W2  F3  I3  W3*
""")


def test_grid_of_1f1b():
    assert draw(OneFOneBFlush(3, 2), 2) == golden("""
stage 0 (worker 0)    F0  F1              B0      B1* F2  F3              B2      B3*
stage 1 (worker 1)        F0  F1      B0      B1*         F2  F3      B2      B3*
stage 2 (worker 2)            F0  B0  F1  B1*                 F2  B2  F3  B3*
""")


def test_grid_of_gpipe():
    assert draw(GPipe(3, 2), 2) == golden("""
stage 0 (worker 0)    F0  F1                  B0  B1* F2  F3                  B2  B3*
stage 1 (worker 1)        F0  F1          B0  B1*         F2  F3          B2  B3*
stage 2 (worker 2)            F0  F1  B0  B1*                 F2  F3  B2  B3*
""")


@pytest.mark.parametrize(
    "schedule", [PACI(4, 4), OneFOneBFlush(4, 4), GPipe(3, 4), PaciV(4, 2)], ids=repr
)
def test_the_picture_at_the_top_of_the_file_is_what_happens(schedule: Schedule):
    """Four characters a column; ``...`` where a row goes on."""
    text = sys.modules[type(schedule).__module__].__doc__ or ""
    rows = [line.strip()[10:] for line in text.splitlines() if line.strip().startswith("stage ")]
    assert len(rows) == schedule.num_stages
    sequencer = Sequencer(schedule)
    sequencer.feed(3 * schedule.accumulation)
    real = [""] * schedule.num_stages
    for at, column in enumerate(sequencer.columns()):
        for kind, stage, j in column:
            if kind is U:
                real[stage] = real[stage].rstrip() + "*"
            else:
                real[stage] = real[stage].ljust(4 * at) + f"{kind.value}{j}"
    for drawn, expected in zip(rows, real, strict=True):
        shown = drawn.removesuffix("...").rstrip()
        assert shown == expected[: len(shown)]

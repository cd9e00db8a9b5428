"""The questions that ``paci bench`` answers, one a verb and a file."""

from __future__ import annotations

from paci.bench.accuracy import TimeToAccuracy
from paci.bench.codec_times import CodecTimes
from paci.bench.convergence import Convergence
from paci.bench.emulate import Emulate
from paci.bench.memory import Memory
from paci.bench.overhead import Overhead
from paci.bench.planned import Planned
from paci.bench.question import Question
from paci.bench.race import Race
from paci.bench.slow_links import Links
from paci.bench.speedrun import Speedrun
from paci.bench.throughput import Throughput
from paci.bench.trials import Trials
from paci.bench.yardstick import Yardstick

QUESTIONS: tuple[type[Question], ...] = (
    Throughput,
    Emulate,
    Links,
    Overhead,
    Memory,
    Planned,
    Trials,
    CodecTimes,
    Convergence,
    Race,
    TimeToAccuracy,
    Yardstick,
    Speedrun,
)

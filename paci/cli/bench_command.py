"""``paci bench``."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import shlex
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn


def add_parser(commands: Any) -> None:
    """Add the command, a verb a question, an option a field of it."""
    from paci.bench.questions import QUESTIONS

    parser = commands.add_parser(
        "bench",
        help="measure, beside torch.distributed.pipelining",
        description="Measure on this machine, in turns, beside torch.distributed.pipelining.",
    )
    verbs = parser.add_subparsers(dest="verb", metavar="QUESTION", required=True)
    for question in QUESTIONS:
        verb = verbs.add_parser(question.name, help=question.summary, description=question.summary)
        texts = question.help()
        for field in dataclasses.fields(question):
            flag = "--" + field.name.replace("_", "-")
            kind = type(field.default)
            word = {int: "N", float: "X"}.get(kind, "TEXT")
            text = texts.get(field.name, "").replace("%", "%%")
            text += "" if field.default == "" else f" ({field.default})"
            verb.add_argument(flag, type=kind, default=field.default, metavar=word, help=text)
        verb.add_argument(
            "--out",
            default="results",
            metavar="FOLDER",
            help="for the JSON and a picture (results)",
        )
        verb.add_argument("--json", action="store_true", help="print JSON instead of a table")
        verb.set_defaults(run=run, question=question)


def run(options: argparse.Namespace, arguments: list[str]) -> int:
    """Measure, print, save; interrupted or told to end, what there is by then."""
    from paci.bench.question import is_interrupted
    from paci.bench.record import record, save, table

    fields = dataclasses.fields(options.question)
    question = options.question(**{field.name: getattr(options, field.name) for field in fields})
    with _ended_as_interrupted() as signals:
        rows = question.answer(lambda line: print(line, file=sys.stderr, flush=True))
    command = shlex.join(["paci", *arguments])
    result = record(question.name, command, dataclasses.asdict(question), rows)
    path = save(result, Path(options.out))
    print(json.dumps(result) if options.json else table(question.summarize(rows), question.columns))
    picture = path.with_suffix(".png")
    drawn = f" and {picture}" if question.draw(rows, picture) else ""
    print(f"written to {path}{drawn}", file=sys.stderr)
    return 128 + signals[0] if is_interrupted(rows) else 0


@contextlib.contextmanager
def _ended_as_interrupted() -> Iterator[list[int]]:
    """Let SIGTERM (of ``timeout``, of a job's end) raise what SIGINT raises.

    Yields:
        The signals that came, and at the end SIGINT.
    """
    came: list[int] = []

    def interrupt(number: int, frame: object) -> NoReturn:
        came.append(number)
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield came
    finally:
        signal.signal(signal.SIGTERM, before)
        came.append(signal.SIGINT)

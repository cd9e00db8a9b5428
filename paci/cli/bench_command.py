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

_INTERRUPTED = 130


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
    """Measure, print, save; when interrupted or told to end, what there is by then."""
    came: list[int] = []
    with _ended_as_interrupted(came):
        try:
            code = _answer(options, arguments)
        except KeyboardInterrupt:
            if not came:
                raise
            print("paci: ended by SIGTERM, and nothing is written", file=sys.stderr)
            code = _INTERRUPTED
    return 128 + came[0] if came and code == _INTERRUPTED else code


def _answer(options: argparse.Namespace, arguments: list[str]) -> int:
    """Answer the question; return the exit code."""
    from paci.bench.question import is_interrupted
    from paci.bench.record import record, save, table

    fields = dataclasses.fields(options.question)
    question = options.question(**{field.name: getattr(options, field.name) for field in fields})
    rows = question.answer(lambda line: print(line, file=sys.stderr, flush=True))
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # until what was measured is written
    code = _INTERRUPTED if is_interrupted(rows) else 0
    if code and all("problem" in row for row in rows):
        print("nothing was measured, so nothing is written", file=sys.stderr)
        return code
    command = shlex.join(["paci", *arguments])
    result = record(question.name, command, dataclasses.asdict(question), rows)
    path = save(result, Path(options.out))
    print(json.dumps(result) if options.json else table(question.summarize(rows), question.columns))
    picture = path.with_suffix(".png")
    drawn = f" and {picture}" if question.draw(rows, picture) else ""
    print(f"written to {path}{drawn}", file=sys.stderr)
    return code


@contextlib.contextmanager
def _ended_as_interrupted(came: list[int]) -> Iterator[None]:
    """Let SIGTERM (of ``timeout``, of a job's end) raise what SIGINT does, once.

    A second one changes nothing: what was measured is being written then. At the end SIGTERM does
    what it did before.

    Args:
        came: where the signal is noted.
    """

    def interrupt(number: int, frame: object) -> NoReturn:
        signal.signal(number, signal.SIG_IGN)
        came.append(number)
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)

"""``paci``: its commands, its exit codes, and the one line that an error gets."""

from __future__ import annotations

import argparse
import importlib
import io
import os
import sys
from collections.abc import Sequence

from paci import __version__
from paci.cli.extras import absent, add_refusal
from paci.errors import ConfigError, PaciError

# The commands, each a module beside this one, and the extra that it needs.
_COMMANDS: dict[str, str | None] = {
    "train": "train",
    "plan": "train",
    "profile": "train",
    "view": None,
    "report": None,
    "generate": "train",
    "evaluate": "train",
    "export": "train",
    "schedules": None,
    "bench": "bench",
}


class _Parser(argparse.ArgumentParser):
    """A parser whose errors are like all others: one line, exit code 2."""

    def error(self, message: str) -> None:  # type: ignore[override]
        raise ConfigError(f"{message}; see `{self.prog} --help`")


def make_parser() -> argparse.ArgumentParser:
    """The parser of the whole command line; raises ``ConfigError`` for what it cannot parse."""
    parser = _Parser(prog="paci", description="Pipeline-parallel training that never stalls.")
    parser.add_argument("--version", action="version", version=f"paci {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for command, extra in _COMMANDS.items():
        if extra is not None and absent(extra):
            add_refusal(commands, command, extra)
        else:
            importlib.import_module(f"paci.cli.{command}_command").add_parser(commands)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; return the exit code: 0, 1 (failed), 2 (bad request), 130 (interrupted), 143
    (a benchmark ended by SIGTERM)."""
    arguments = sys.argv[1:] if arguments is None else arguments
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a model may write what a terminal cannot show
    try:
        try:
            return _run(arguments)
        finally:
            sys.stdout.flush()  # while a reader that has gone away can still be dealt with
    except PaciError as error:
        _print_error(str(error))
        return error.exit_code
    except KeyboardInterrupt:
        _print_error("interrupted")
        return 130
    except BrokenPipeError:
        # Whoever read our output has closed it (as `head` does).
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:
        _print_error(f"{error}; what was written before is whole")
        return 1


def _run(arguments: Sequence[str]) -> int:
    options, unknown = make_parser().parse_known_args(arguments)
    if "refusal" in options:
        raise ConfigError(options.refusal)
    if unknown:
        raise ConfigError(
            f"an option must be one that `paci {options.command} --help` lists, got "
            f"{' '.join(unknown)!r}; mend or remove it"
        )
    return int(options.run(options, list(arguments)))


def _print_error(message: str) -> None:
    rank = f"rank {os.environ['RANK']}: " if "RANK" in os.environ else ""
    # One write a line: the ranks of a job share their stderr.
    print(f"paci: error: {rank}{message}\n", end="", file=sys.stderr, flush=True)

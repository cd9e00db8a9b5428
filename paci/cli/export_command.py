"""``paci export``."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from paci.errors import PaciError


def add_parser(commands: Any) -> None:
    """Add the command."""
    parser = commands.add_parser(
        "export",
        help="a trained model's weights as one safetensors file",
        description="Write the whole model of a run's newest checkpoint as one safetensors file: "
        "fp32 weights by their names in the model, however it was cut, with the model's "
        "configuration as metadata.",
    )
    parser.add_argument("folder", metavar="RUN", help="run folder that `paci train` made")
    parser.add_argument("file", metavar="FILE", help="to write; must not be there yet")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace, arguments: list[str]) -> int:
    """Write the file; say how many weights it holds."""
    from safetensors import SafetensorError

    from paci.train.summary import export

    try:
        num = export(Path(options.folder), Path(options.file))
    except SafetensorError as error:  # of a full disk too, which is no OSError there
        raise PaciError(
            f"the file must be written whole, got {str(error)!r} for {options.file}; make room for "
            f"it (disk, quota, ulimit -f), or name another"
        ) from error
    print(f"{num:,} parameters written to {options.file}")
    return 0

"""``paci generate``."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any


def add_parser(commands: Any) -> None:
    """Add the command."""
    parser = commands.add_parser(
        "generate",
        help="let a trained model write text",
        description="Let the model of a run write text, on one device whatever it was trained on.",
    )
    parser.add_argument("folder", metavar="RUN", help="run folder that `paci train` made")
    parser.add_argument("--prompt", default="", metavar="TEXT", help="text to go on from")
    parser.add_argument(
        "--tokens", type=int, default=200, metavar="N", help="tokens to write (200)"
    )
    parser.add_argument(
        "--temperature",
        type=float,
        default=0.8,
        metavar="X",
        help="of the draws; 0 always takes the most likely token (0.8)",
    )
    parser.add_argument(
        "--top-k",
        type=int,
        default=50,
        metavar="N",
        help="draw from the N most likely tokens only (50)",
    )
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="seed of the draws (0)")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace, arguments: list[str]) -> int:
    """Print the prompt and what follows."""
    from paci.train.summary import sample_text

    text = sample_text(
        Path(options.folder),
        options.prompt,
        options.tokens,
        options.temperature,
        options.top_k,
        options.seed,
    )
    print(text)
    return 0

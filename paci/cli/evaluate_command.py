"""``paci evaluate``."""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any


def add_parser(commands: Any) -> None:
    """Add the command."""
    parser = commands.add_parser(
        "evaluate",
        help="a trained model's loss on other text",
        description="The loss of a run's model on any text, on one device.",
    )
    parser.add_argument("folder", metavar="RUN", help="run folder that `paci train` made")
    parser.add_argument("--data", required=True, metavar="TEXT", help="as of `paci train`")
    parser.add_argument(
        "--batches",
        type=int,
        default=50,
        metavar="N",
        help="batches, of 16 windows each, spread evenly over the text (50)",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace, arguments: list[str]) -> int:
    """Print loss and perplexity."""
    from paci.train.summary import evaluate_text

    loss, num_tokens = evaluate_text(Path(options.folder), options.data, options.batches)
    perplexity = math.exp(min(loss, 700.0))
    if options.json:
        print(json.dumps({"loss": loss, "perplexity": perplexity, "num_tokens": num_tokens}))
    else:
        print(f"loss {loss:.4f}, perplexity {perplexity:.2f}, over {num_tokens:,} tokens")
    return 0

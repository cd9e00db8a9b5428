"""What some commands need beyond the package itself, and what they say where that is absent.

The package itself needs torch, numpy and safetensors. What is listed here is what pyproject.toml
has under the same extra.
"""

from __future__ import annotations

import importlib.util
from typing import Any

DISTRIBUTION = "paci-pipeline"  # what is installed is called so; it is imported as paci
PACKAGES = {
    "train": ("pydantic", "tokenizers", "matplotlib"),
    "bench": ("pydantic", "tokenizers", "matplotlib"),
}


def absent(extra: str) -> list[str]:
    """The packages of an extra that are not installed."""
    return [name for name in PACKAGES[extra] if importlib.util.find_spec(name) is None]


def add_refusal(commands: Any, command: str, extra: str) -> None:
    """Add a command that says what must be installed, whatever its options are."""
    remedy = f"pip install '{DISTRIBUTION}[{extra}]'"
    parser = commands.add_parser(command, help=f"(not installed: {remedy})", add_help=False)
    parser.set_defaults(
        refusal=f"paci {command} needs the packages {', '.join(PACKAGES[extra])}, got no "
        f"{', '.join(absent(extra))}; {remedy}"
    )

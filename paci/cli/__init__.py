"""The command line: parse, call, print."""

from paci.cli.app import main

__all__ = ["main"]

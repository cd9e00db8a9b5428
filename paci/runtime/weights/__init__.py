"""Decide which weights a forward and a backward see; each file holds one policy."""

"""Measure drift, times, memory, progress and links without changing what is computed."""

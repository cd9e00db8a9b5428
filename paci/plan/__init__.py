"""Predict the time and memory of a run: partitioner, cost model, simulators and search."""

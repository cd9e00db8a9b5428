"""What a run will cost before it starts: partitioner, cost model, simulator, search; no torch."""

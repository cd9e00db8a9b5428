"""What runs, in which order, on which weights: pure Python, no torch, no clock."""

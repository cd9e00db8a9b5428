"""How tensors get from a stage to its neighbour: channels, and what crosses them."""

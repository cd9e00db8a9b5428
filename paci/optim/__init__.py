"""What delay asks of an optimizer."""

"""The trainer: one user of the library. Configuration, loop, checkpoints, metrics, launch."""

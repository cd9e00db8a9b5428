"""Optimizers, gradient clipping, learning rates and predictions of steps under delay."""

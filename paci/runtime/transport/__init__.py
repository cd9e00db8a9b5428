"""Channels that carry tensors between neighbouring stages, and the form of their messages."""

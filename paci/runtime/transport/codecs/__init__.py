"""Codecs, which make the tensors that cross a boundary small."""

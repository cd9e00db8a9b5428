"""Hosts on one machine, joined by links that are as slow as one asks for."""

"""Stages: how a module is called, differentiated and updated, without other processes."""

"""A stage: a module, how it is called, differentiated and updated. Knows no other process."""

"""Which blocks to skip: the selection, and how it is chosen."""

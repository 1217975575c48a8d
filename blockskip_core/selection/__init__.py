"""Which blocks to skip: a selection, and how it is made."""

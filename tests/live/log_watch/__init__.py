"""A pack without nodes for live tests: its prestartup script writes warnings and errors to a separate file."""

NODE_CLASS_MAPPINGS = {}

"""A pack for live tests, without nodes: its prestartup script writes warnings and errors to a file of their own."""

NODE_CLASS_MAPPINGS = {}

"""The table of ``sampling.py``."""

def write(rows, folder):
    pass

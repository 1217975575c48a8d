"""A model's blocks replaced for the duration of a run: stand-ins, and what they replay."""

"""A model's blocks replaced for the time of a run: stand-ins, and what they replay."""

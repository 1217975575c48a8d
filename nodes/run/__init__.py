"""One training run behind the trainer's node."""

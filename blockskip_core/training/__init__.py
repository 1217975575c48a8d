"""The training: its settings, its loop, its optimisers, its checkpoints."""

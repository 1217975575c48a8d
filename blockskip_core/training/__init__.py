"""The training: settings, loop, optimisers, checkpoints."""

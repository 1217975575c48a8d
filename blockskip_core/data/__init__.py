"""Training examples: which crop, noise level and noise, in which order, and the loss on them."""

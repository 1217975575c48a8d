"""One training run: a request and residuals in, a LoRA and its summary out, whoever asked for it."""

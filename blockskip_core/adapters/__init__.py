"""The part that is trained: low-rank adapters, and how files store them."""

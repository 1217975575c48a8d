"""What is trained: low-rank adapters, and their form in files."""

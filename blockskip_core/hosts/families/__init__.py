"""What differs between families of models: one file per family, and the registry of them."""

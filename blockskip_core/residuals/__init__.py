"""What skipped blocks would have added: computed, stored, and provided to the training."""

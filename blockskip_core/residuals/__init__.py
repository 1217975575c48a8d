"""What skipped blocks would have added: computed, stored, and handed to the training."""

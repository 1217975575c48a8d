"""DiT-BlockSkip: LoRA training of diffusion transformers with most of the model left out.

Everything here but ``hosts`` runs on plain torch. See ARCHITECTURE.md for a map.
"""

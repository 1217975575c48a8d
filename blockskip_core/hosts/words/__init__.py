"""Words that are learned from forward passes, with the host's text encoders and models.

encoders       the text encoders in a CLIP, their tokenizers, and the vectors that they have for known words
captions       captions as tokens with the learned vectors in the place of the word
latents        pictures as latents of one size
noise_levels   which noise belongs to a level, and the model's own error, for every kind of prediction
losses         the loss of several words on one example: encoded prompts, one batch through the model
samples        pictures of prompts with the word so far, through the host's own sampler
"""

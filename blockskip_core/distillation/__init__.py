"""Distillation of a model into itself with coarse patches: the same weights teach and learn, only adapters are trained.

Source: DDiT (arXiv 2602.16968, Eq. 1): the velocity with coarse patches should be that with the model's own patches.

settings    numbers of a training
examples    noisy latents at seeded noise levels
validation  error by noise level on held-out examples
loop        the training: resumable bit for bit, and it stops by itself
"""

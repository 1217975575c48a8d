"""The hosts: ComfyUI, the only part of the core that imports ``comfy``, and diffusers, which works without it.

ComfyUI:

families    what differs between families of diffusion transformers; which one a MODEL belongs to
inputs      conditionings and pictures -> what a model is called with
files       where files are kept; LoRA files
models      a loaded MODEL run with blocks replaced, quantised or without weights; its identity
sampling    pictures made with the host's own samplers
runs        a training run from its request to its files, whoever asked for it
words       words learned from forward passes, with the host's text encoders

Without ComfyUI:

diffusers   diffusers' transformers run with blocks replaced; its pipelines' texts, pictures and LoRA files
"""

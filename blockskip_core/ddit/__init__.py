"""Dynamic patches (DDiT, arXiv 2602.16968): some steps of sampling cut the latent into larger patches than others.

A step with patches of s times the model's own side sees s squared times fewer tokens. What the model needs for that is a
small trained adapter; which steps are coarse is decided once per step, for the whole picture.

patch_resizing     fold and unfold; a patch resized to the model's own size and back (FlexiViT's pseudo-inverse)
coarse_noise       the noise level that a resized latent has for the model
connection         what the resized latent lacks, carried around the model
patch_adapter      what is trained: embedding, de-embedding, identifier, residual block
coarse_estimate    one coarse call of a model, assembled from these
third_difference   how fast the clean estimate changes: the paper's criterion, and one that no number of steps changes
scheduler          the paper's decision, with a minimum and a maximum length of a coarse run
error_table        an adapter's error by noise level, as measured after its training
operations         operations of a step by its number of tokens
windows            schedules without a decision while sampling: given windows, or the best within an error budget
plans              how the patch size of every step of a run is chosen
coarse_levels      noise levels of the coarse steps of a plan, for training on them alone
trained_patches    the adapters of one model, and their tensors by name in files

Noise levels (sigmas) are those of flow matching: latent = (1 - sigma) clean + sigma noise; the velocity is noise - clean.
Axis legend: ``B`` batch, ``C`` channels, ``H`` and ``W`` latent cells, ``p`` side of the model's own patch in cells, ``s``
scale, ``q = s p`` side of a coarse patch, ``N`` coarse tokens, ``n = C q q`` numbers of one. In a clip ``C`` and ``N`` are those of
each of ``F`` frames, unless said otherwise, and latents are (B, C F, H, W).
"""

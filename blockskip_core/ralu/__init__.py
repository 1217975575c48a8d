"""Region-adaptive latent upsampling (RALU, arXiv 2507.08422): three stages of sampling, from coarse to fine.

The first stage samples at half the side. The second brings the regions that are prone to artefacts to full
resolution and leaves the rest coarse. The third brings all the rest to full resolution.

noise_matching     the noise added to a latent between stages, so that it looks like a latent of the next stage
timestep_matching  which noise levels the stages step through: published presets, or solved for other settings
token_grid         a latent whose tokens have two sizes, and where they are
regions            which tokens become fine early: edges of the decoded estimate, or gradients of the latent
overlay            a picture of that choice

Times are the paper's: 0 is noise and 1 is clean. Noise levels (sigmas) are 1 minus the time.
"""

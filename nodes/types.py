"""The pack's own types for inputs and outputs."""

from __future__ import annotations

from comfy_api.latest import io

BlockSelectionSocket = io.Custom("BLOCKSKIP_SELECTION")  # blockskip_core.selection.selection.BlockSelection
ResidualsSocket = io.Custom("BLOCKSKIP_RESIDUALS")  # blockskip_core.residuals.residual_set.ResidualSet
MemorySettingsSocket = io.Custom("BLOCKSKIP_MEMORY")  # blockskip_core.accounting.plan.MemorySettings
TrainingFilesSocket = io.Custom("BLOCKSKIP_FILES")  # blockskip_core.hosts.inputs.material.TrainingFile, one a picture
SamplesSocket = io.Custom("BLOCKSKIP_SAMPLES")  # blockskip_core.hosts.sampling.training_samples.SampleRequest
LoraModelSocket = io.Custom("LORA_MODEL")  # core's: a flat dict of tensors
LossMapSocket = io.Custom("LOSS_MAP")  # core's: {"loss": [float, ...]}
PatchAdaptersSocket = io.Custom("BLOCKSKIP_PATCH_ADAPTERS")  # blockskip_core.ddit.trained_patches.TrainedPatches

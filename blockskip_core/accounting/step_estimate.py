"""A rough estimate of a training step's memory from a few numbers; ``phase_counts`` counts exactly."""

from __future__ import annotations


def estimated_step_bytes(
    *, num_kept: int, tokens: int, width: int, itemsize: int, batch_size: int, checkpointing: bool, lora_numbers: int
) -> int:
    """Return roughly how many bytes a step needs on top of the weights, so that the host can keep them free.

    A rule of thumb that needs only a few numbers; ``phase_counts`` counts exactly, and a test compares the two. The
    LoRA takes 16 bytes per number: itself, its gradient and AdamW's two moments. A block with LoRA on all its linear
    layers keeps 18 to 25 numbers per token and unit of width for its backward (counted on FLUX blocks: 18 with a GPU's
    fused kernels, up to 25 with plain ones); 22 are assumed here. With checkpointing every block keeps only its input,
    and one block at a time is recomputed.

    Args:
        num_kept: Number of trained blocks.
        tokens: Image and text tokens per row, N + L.
        width: D.
        itemsize: Bytes per number.
        batch_size: Number of rows.
        checkpointing: Whether activations are recomputed.
        lora_numbers: Trainable numbers.
    """
    stream = tokens * width * itemsize * batch_size
    activations = (stream * num_kept + 25 * stream) if checkpointing else 22 * stream * num_kept
    return activations + 16 * lora_numbers

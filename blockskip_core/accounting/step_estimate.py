"""About how much memory a training step takes, from a few numbers; ``phase_counts`` counts exactly."""

from __future__ import annotations


def estimated_step_bytes(
    *, num_kept: int, tokens: int, width: int, itemsize: int, batch_size: int, checkpointing: bool, lora_numbers: int
) -> int:
    """Return about how much memory a step takes in addition to the weights, for the host to keep free.

    A rule of thumb that asks for nothing but numbers; ``phase_counts`` counts exactly, and a test compares the two.
    The LoRA takes 16 bytes a number: itself, its gradient and AdamW's two moments. A block with LoRA on all its linear
    layers keeps 18 to 25 numbers per token and unit of width for its backward (FLUX blocks, counted: 18 with a GPU's fused
    kernels, up to 25 with plain ones); 22 are asked for. With checkpointing every block keeps its input only, and one
    block at a time is recomputed.

    Args:
        num_kept: Blocks that are trained.
        tokens: Image and text tokens of one row, N + L.
        width: D.
        itemsize: Bytes per number.
        batch_size: Rows.
        checkpointing: Whether activations are recomputed.
        lora_numbers: Trainable numbers.
    """
    stream = tokens * width * itemsize * batch_size
    activations = (stream * num_kept + 25 * stream) if checkpointing else 22 * stream * num_kept
    return activations + 16 * lora_numbers

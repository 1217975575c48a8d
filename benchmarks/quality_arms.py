"""The arms of the quality benchmark: which pictures a LoRA sees, which blocks are skipped, what replaces them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

FULL, SMALL = 256, 128  # the world's full picture size, and the smaller training size

Views = Literal["full", "resize", "low-to-high", "high-to-low", "random"]
Choice = Literal[
    "none", "measured", "measured on a trained model", "preset", "first only", "last only",
    "measured, before the last block", "front, by bytes", "cost and influence", "by hand",
]  # fmt: skip
StandIn = Literal[
    "cached",
    "on the fly",
    "nothing",
    "refreshed",
    "diagonal",
    "linear",
    "linear, refreshed",
    "new linear",
    "exact",
    "exact, 4-bit",
    "exact, int8",
    "int8",
    "fp8",
]


@dataclass(frozen=True)
class Arm:
    """One way to train.

    Attributes:
        name: The row's name.
        part: The section of the table.
        source: Where it is in the paper; empty for our own arms.
        views: Pictures at full size, resized to the small size, or dynamic patches in an order.
        choice, ratio: How skipped blocks are chosen, and their share: of the number of blocks, or of their bytes.
        spans: First and last blocks, if they are chosen by hand.
        stand_in: What replaces the skipped blocks.
        trained_in: The format of the trained blocks' weights during the training; empty for that of the model.
        changes: What differs from the common settings: factors of rank, learning_rate, steps and draws; refreshes, ema,
            caption_dropout; corrected, 1 if offsets undo what quantisation changes.
    """

    name: str
    part: str
    source: str = ""
    views: Views = "low-to-high"
    choice: Choice = "none"
    ratio: float = 0.0
    spans: tuple[int, int] = (0, 0)
    stand_in: StandIn = "cached"
    trained_in: str = ""
    changes: dict[str, float] = field(default_factory=dict)


BASELINE = "LoRA, all blocks, full size"
HALF = {"choice": "measured", "ratio": 0.5}
DEEP = "beyond the paper, 50 % skipped, patches"
WHERE = "other places, 50 % skipped, patches"
CARDS = "whole pictures: first blocks skipped, last blocks frozen"
SPANS = ((3, 6), (3, 7), (3, 4), (4, 4), (2, 3), (1, 3), (1, 2))
"""Numbers of first blocks that are skipped and of last blocks that are frozen, of the world's 12."""

ARMS: tuple[Arm, ...] = (
    Arm(BASELINE, "upper bound", "Table 1", views="full"),
    Arm("LoRA, all blocks, learning rate x 1.5", "upper bound", views="full", changes={"learning_rate": 1.5}),
    Arm("LoRA, all blocks, average 0.98", "upper bound", views="full", changes={"ema": 0.98}),
    Arm("LoRA, all blocks, captions dropped 0.1", "upper bound", views="full", changes={"caption_dropout": 0.1}),
    Arm("LoRA, all blocks, steps x 1.4", "upper bound", views="full", changes={"steps": 1.4}),
    Arm("resize to small", "pictures", "Tables 2, 11", views="resize"),
    Arm("patches, low to high", "pictures", "Tables 2, 11"),
    Arm("patches, high to low", "pictures", "Table 11", views="high-to-low"),
    Arm("patches, random", "pictures", "Table 11", views="random"),
    *(
        Arm(f"skip {ratio:.0%}, full size", "skipping, full size", "Table 12", "full", "measured", ratio)
        for ratio in (0.3, 0.4, 0.5)
    ),
    *(
        Arm(f"skip {ratio:.0%}, patches", "skipping, patches", "Table 1", choice="measured", ratio=ratio)
        for ratio in (0.3, 0.4, 0.5)
    ),
    Arm("no residual", "50 % skipped, patches", "Table 2", **HALF, stand_in="nothing"),
    Arm("skip only the first", "50 % skipped, patches", "Table 2", choice="first only", ratio=0.5),
    Arm("skip only the last", "50 % skipped, patches", "Table 2", choice="last only", ratio=0.5),
    Arm("the paper's choice, scaled", "50 % skipped, patches", "Table 4", choice="preset", ratio=0.5),
    Arm(
        "measured on a trained model",
        "50 % skipped, patches",
        "Fig. 3",
        choice="measured on a trained model",
        ratio=0.5,
    ),
    Arm("on the fly (exact back residual)", DEEP, **HALF, stand_in="on the fly"),
    Arm("refreshed 4 times", DEEP, **HALF, stand_in="refreshed", changes={"refreshes": 4}),
    Arm("diagonal response", DEEP, **HALF, stand_in="diagonal"),
    Arm("linear response", DEEP, **HALF, stand_in="linear"),
    Arm("new linear", DEEP, **HALF, stand_in="new linear"),
    Arm("linear response, refreshed 4 times", DEEP, **HALF, stand_in="linear, refreshed", changes={"refreshes": 4}),
    Arm("a quarter of the draws", DEEP, **HALF, changes={"draws": 0.25}),
    Arm("residuals in int8", DEEP, **HALF, stand_in="int8"),
    Arm("residuals in fp8", DEEP, **HALF, stand_in="fp8"),
    Arm("rank x 2", DEEP, **HALF, changes={"rank": 2}),
    Arm("learning rate x 2", DEEP, **HALF, changes={"learning_rate": 2}),
    Arm("exact back", WHERE, **HALF, stand_in="exact"),
    Arm("exact back, 4-bit", WHERE, **HALF, stand_in="exact, 4-bit"),
    Arm("span before the last block", WHERE, choice="measured, before the last block", ratio=0.5),
    Arm(
        "span before the last block, new linear",
        WHERE,
        choice="measured, before the last block",
        ratio=0.5,
        stand_in="new linear",
    ),
    Arm("front only, half of the bytes", WHERE, choice="front, by bytes", ratio=0.5),
    Arm("cost and influence, half of the bytes", WHERE, choice="cost and influence", ratio=0.5),
    *(
        Arm(f"first and last {ratio:.0%}{weights}, {views}", CARDS, "", view, "preset", ratio, stand_in=stand_in)
        for ratio, stand_in, weights in (
            (0.5, "exact", ""),
            (0.5, "exact, 4-bit", ", 4-bit"),
            (0.3, "exact, 4-bit", ", 4-bit"),
        )
        for views, view in (("full size", "full"), ("patches", "low-to-high"))
    ),
    *(
        Arm(f"first and last {ratio:.0%}, int8, full size", CARDS, "", "full", "preset", ratio, stand_in="exact, int8")
        for ratio in (0.5, 0.3)
    ),
    *(
        Arm(f"first {n}, last {m}, int8, full size", CARDS, "", "full", "by hand", spans=(n, m), stand_in="exact, int8")
        for n, m in SPANS
    ),
    *(
        Arm(
            f"first {n}, last {m}, {frozen}, learning rate x {factor:g}, full size",
            CARDS,
            views="full",
            choice="by hand",
            spans=(n, m),
            stand_in=stand_in,
            changes={"learning_rate": factor},
        )
        for n, m, frozen, stand_in, factor in (
            (3, 6, "int8", "exact, int8", 2),
            (3, 7, "int8", "exact, int8", 2),
            (3, 4, "int8", "exact, int8", 1.5),
            (2, 5, "int8", "exact, int8", 2),
            (1, 6, "int8", "exact, int8", 2),
            (3, 6, "4-bit", "exact, 4-bit", 2),
        )
    ),
    Arm(
        "first and last 50%, int8, learning rate x 2, full size",
        CARDS,
        views="full",
        choice="preset",
        ratio=0.5,
        stand_in="exact, int8",
        changes={"learning_rate": 2},
    ),
    Arm("first and last 50%, constant, full size", CARDS, "", "full", "preset", 0.5),
    *(
        Arm(
            f"first {n}, last {m}, {frozen}, trained in {weights}{suffix}, full size",
            CARDS,
            views="full",
            choice="by hand",
            spans=(n, m),
            stand_in=stand_in,
            trained_in=weights,
            changes=changes,
        )
        for n, m, frozen, stand_in, weights, suffix, changes in (
            (1, 3, "int8", "exact, int8", "int8", "", {}),
            (3, 6, "int8", "exact, int8", "int8", ", learning rate x 2", {"learning_rate": 2}),
            (3, 6, "4-bit", "exact, 4-bit", "int8", ", learning rate x 2", {"learning_rate": 2}),
            (3, 6, "4-bit", "exact, 4-bit", "4-bit", ", learning rate x 2", {"learning_rate": 2}),
            (4, 2, "4-bit", "exact, 4-bit", "4-bit", "", {}),
            (4, 2, "constant", "cached", "int8", "", {}),
        )
    ),
    *(
        Arm(
            f"first {n}, last {m}, 4-bit, trained in {weights}, corrected{suffix}, full size",
            CARDS,
            views="full",
            choice="by hand",
            spans=(n, m),
            stand_in="exact, 4-bit",
            trained_in=weights,
            changes={"corrected": 1, **changes},
        )
        for n, m, weights, suffix, changes in (
            (3, 6, "4-bit", ", learning rate x 2", {"learning_rate": 2}),
            (3, 6, "int8", ", learning rate x 2", {"learning_rate": 2}),
            (1, 3, "4-bit", "", {}),
            (2, 3, "4-bit", "", {}),
            (4, 2, "4-bit", "", {}),
        )
    ),
    Arm("front only, half of the bytes, full size", CARDS, "", "full", "front, by bytes", 0.5),
    Arm("cost and influence, half of the bytes, full size", CARDS, "", "full", "cost and influence", 0.5),
    *(
        Arm(
            f"first and last 50%, {what} {factor}, full size",
            CARDS,
            views="full",
            choice="preset",
            ratio=0.5,
            stand_in="exact",
            changes={key: value},
        )
        for what, factor, key, value in (
            ("rank", "x 2", "rank", 2),
            ("learning rate", "x 1.5", "learning_rate", 1.5),
            ("average", "0.98", "ema", 0.98),
            ("captions dropped", "0.1", "caption_dropout", 0.1),
            ("steps", "x 1.4", "steps", 1.4),
        )
    ),
)


def arm_named(name: str) -> Arm:
    """Return the arm with a name."""
    for arm in ARMS:
        if arm.name == name:
            return arm
    raise KeyError(f"There is no arm {name!r}; there are: {', '.join(arm.name for arm in ARMS)}.")

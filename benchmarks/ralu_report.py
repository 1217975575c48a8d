"""The tables of the RALU benchmark."""

from __future__ import annotations

from pathlib import Path
from typing import Any

# The paper's numbers in 10^12 operations: arXiv 2507.08422, results on FLUX.1-dev at 1024 px.
PAPER = {"plain": 2991.0, "FLUX 5x": 540.47, "FLUX 7x": 426.01}
# Text tokens and share of early regions for which the counts are closest to them.
LIKELY = {"plain": (512, None), "FLUX 5x": (256, 0.2), "FLUX 7x": (512, 0.1)}
ASKED = ("shape", "colour", "ground", "place", "size", "finish")
TERA = 1e12


def write(rows: list[dict[str, Any]], folder: Path) -> None:
    """Write ``ralu.md``."""
    parts = {part: [row for row in rows if row["part"] == part] for part in ("operations", "pictures", "caches")}
    text = ["# RALU Sampler: operations and pictures", ""]
    if parts["operations"]:
        text += _operations(parts["operations"])
    if parts["pictures"]:
        text += _pictures(parts["pictures"])
    if parts["caches"]:
        text += _caches(parts["caches"])
    text += _seconds([row for row in rows if row["part"].startswith("seconds")])
    (folder / "ralu.md").write_text("\n".join(text) + "\n", encoding="utf-8")


def whole_run(rows: list[dict[str, Any]], what: str, text_tokens: int, ratio: float | None, kind: str) -> float:
    """Return the operations of a run from prompt to picture, in 10^12.

    Args:
        rows: Rows of the part.
        what: "plain", or a preset.
        text_tokens: Number of text tokens.
        ratio: Share of early regions.
        kind: "products" excludes attention's own products, "all" includes them.
    """

    def of(model: str, what: str, tokens: int, ratio: float | None = None) -> float:
        row = next(
            r for r in rows if (r["model"], r["what"], r["text_tokens"], r["ratio"]) == (model, what, tokens, ratio)
        )
        return (row["products"] + (row["attention"] if kind == "all" else 0)) / TERA

    total = of("FLUX.1-dev", what, text_tokens, ratio) + of("T5-XXL", "once", text_tokens)
    total += of("VAE decoder", "1024 px", 0)
    return total if what == "plain" else total + of("VAE decoder", "512 px", 0)


def _operations(rows: list[dict[str, Any]]) -> list[str]:
    text = [
        "## Operations, counted", "",
        f"{rows[0]['about']} The host's own classes at full size ran on torch's `meta` device (shapes without "
        "memory).", "",
        "Multiplications and additions at 1024 x 1024, one multiply-add as 2, in 10¹². The transformer only, without "
        "guidance by a second call.", "",
        "| model | sampling | early regions | text tokens | steps | without attention's products | with them | of "
        "plain |",
        "|---|---|---|---|---|---|---|---|",
    ]  # fmt: skip
    plain = {}
    for row in rows:
        if row["model"] in ("T5-XXL", "VAE decoder"):
            continue
        total = (row["products"] + row["attention"]) / TERA
        key = row["model"], row["text_tokens"]
        plain.setdefault(key, total)
        early = "" if row["ratio"] is None else row["ratio"]
        text.append(
            f"| {row['model']} | {row['what']} | {early} | {row['text_tokens']} | {row['steps']} | "
            f"{row['products'] / TERA:.1f} | {total:.1f} | 1 / {plain[key] / total:.2f} |"
        )
    text += [
        "", "### Comparison with the paper", "",
        "The paper's numbers are for whole runs **without attention's own two products** (queries with keys, weights "
        "with values): with text encoder (T5-XXL), decoder, and for the stages one decoding at 512 px. Each agrees "
        "with one number of text tokens and one share of early regions:", "",
        "| sampling | paper | counted | difference | text tokens | early regions |", "|---|---|---|---|---|---|",
    ]  # fmt: skip
    for what, (tokens, ratio) in LIKELY.items():
        counted = whole_run(rows, what, tokens, ratio, "products")
        early = "" if ratio is None else ratio
        text.append(
            f"| {what} | {PAPER[what]:.2f} | {counted:.2f} | {100 * (counted / PAPER[what] - 1):+.2f} % | {tokens} | "
            f"{early} |"
        )
    text += [
        "", "So the numbers fit a plain run with 512 text tokens, a 5x run with 256, and a 7x run with 512 and the 0.1 of the "
        "published code, not the 0.2 of the text. This is our interpretation; the paper does not say. Whole runs with "
        "the same text for both:", "",
        "| sampling | early regions | text tokens | without attention's products | of plain | with them | of plain |",
        "|---|---|---|---|---|---|---|",
    ]  # fmt: skip
    for tokens in (256, 512):
        for what, ratio in (("plain", None), ("FLUX 5x", 0.2), ("FLUX 7x", 0.2), ("FLUX 7x", 0.1)):
            cells = []
            for kind in ("products", "all"):
                counted = whole_run(rows, what, tokens, ratio, kind)
                cells += [f"{counted:.1f}", f"1 / {whole_run(rows, 'plain', tokens, None, kind) / counted:.2f}"]
            text.append(f"| {what} | {'' if ratio is None else ratio} | {tokens} | {' | '.join(cells)} |")
    return [*text, ""]


def _pictures(rows: list[dict[str, Any]]) -> list[str]:
    prompts = rows[0]["prompts"]
    text = [
        "## Pictures of the demo's world", "",
        f"{rows[0]['about']} The demo's model (FLUX.1 format, 256 px, guidance 4), {prompts} prompts that are not in "
        "its training pictures, one seed each, with the same initial noise in every row. The columns from shape to "
        f"finish are the share of right answers of its reader. With so few pictures one answer is {100 / prompts:.0f} "
        "%. Likeness: cosine of the reader's features with those of the prompt's scene as drawn by the world. Edges: "
        "share of edge pixels (Canny). Borders: how much larger pixel steps are at the borders of tokens than "
        "elsewhere. Operations: 10⁹ for one picture without guidance, counted. Seconds: for all pictures, on a shared "
        "CPU.", "",
        "| sampling | operations | of plain | " + " | ".join(ASKED) + " | likeness | edges | borders | seconds |",
        "|---|---|---|" + "---|" * (len(ASKED) + 4),
    ]  # fmt: skip
    plain = next(row["operations"] for row in rows if row["operations"])
    for row in rows:
        spent = f"{row['operations'] / 1e9:.1f} | 1 / {plain / row['operations']:.2f}" if row["operations"] else " | "
        right = " | ".join(f"{100 * row[name]:.0f} %" for name in ASKED)
        text.append(
            f"| {row['name']} | {spent} | {right} | {row['likeness']:.3f} | {100 * row['edges']:.2f} % | "
            f"{row['borders']:.3f} | {row['seconds']:.0f} |"
        )
    return [*text, "", "![One row per way of sampling, one column per prompt](ralu_samples.jpg)"]


def _caches(rows: list[dict[str, Any]]) -> list[str]:
    text = [
        "", "## With core's EasyCache", "",
        f"{rows[0]['about']} The same world in bfloat16, {rows[0]['prompts']} prompts in batches of ten. For a cache "
        "every stage is a separate run. Calls: how often the model itself was called in each stage, averaged over the "
        "batches.", "",
        "| sampling | threshold | steps | calls | shape | likeness |", "|---|---|---|---|---|---|",
    ]  # fmt: skip
    for row in rows:
        calls = " + ".join(f"{number:g}" for number in row["calls"])
        text.append(
            f"| {row['name']} | {row['threshold'] or 'off'} | {row['steps']} | {calls} | {100 * row['shape']:.0f} % | "
            f"{row['likeness']:.3f} |"
        )
    return text


def _seconds(rows: list[dict[str, Any]]) -> list[str]:
    if not rows:
        return []
    text = [
        "", "## Seconds", "",
        "FLUX.1 models with random weights. For plain sampling the steps in the column \"run\" were run, and the time "
        "of 50 is calculated; regions by latent gradient, without decoding. On a CPU: processor time, because the "
        "machine was shared; other load still slows it down through memory, so these are rough.", "",
        "| model | device | side | sampling | run | seconds | of plain |", "|---|---|---|---|---|---|---|",
    ]  # fmt: skip
    for row in rows:
        text.append(
            f"| {row['shape']}, {row['dtype']} | {row['device']} | {row['side']} | {row['name']} | {row['run']} | "
            f"{row['seconds']:.2f} | 1 / {row['ratio']:.2f} |"
        )
    return [*text, "", *sorted({row["about"] for row in rows})]

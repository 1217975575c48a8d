"""README and the other documents agree with the code and with the benchmarks' results."""

from __future__ import annotations

import json
import re

from .texts import ROOT, messages, read, rows, section

MOST_WORDS = 970
GIB = 2**30
OF_OTHERS = ("Allocation on device",)  # a message of torch or ComfyUI
KEPT_IN_MODELS = {
    "FLUX.1 dev": ["BlockSkip"],
    "FLUX.2 dev": ["FLUX.2-dev"],
    "FLUX.2 Klein": ["FLUX.2-klein-4B"],
    "Qwen-Image": ["Qwen-Image"],
    "Z-Image": ["Z-Image"],
    "Wan": ["Wan2.1-T2V-1.3B", "Wan2.1-T2V-14B"],
    "Chroma": ["Chroma"],
    "MiniMax H3": ["MiniMax-H3"],
    "Krea 2": ["Krea-2"],
    "LTX-2 (its": ["LTX-2"],
    "HunyuanVideo |": ["HunyuanVideo"],
    "SD3.5": ["SD3.5-Large"],
    "LTX-Video 2B": ["LTX-Video-2B", "LTX-Video-13B"],
    "AuraFlow": ["AuraFlow"],
    "Mage-Flow": ["Mage-Flow"],
    "Lens": ["Lens"],
    "Boogu": ["Boogu-Image"],
    "Kandinsky 5, picture": ["Kandinsky-5-Image-Lite"],
    "HunyuanImage": ["HunyuanImage-2.1"],
    "OmniGen2": ["OmniGen2"],
    "JoyImage": ["JoyAI-Image-Edit"],
    "HunyuanVideo 1.5": ["HunyuanVideo-1.5"],
    "Kandinsky 5 Lite, video": ["Kandinsky-5-T2V-Lite"],
    "Ideogram 4": ["Ideogram-4"],
    "Anima": ["Anima"],
    "Ernie-Image": ["Ernie-Image"],
}  # the start of a row in docs/models.md -> parts of the benchmark


DEFAULT = "skip and freeze 0.5: a quarter skipped, half frozen in int8"


def counted(part, weights, name=""):
    """Return the peak in GiB of a training step at 256 px with checkpointing, residuals from disk; with no name, half skipped."""
    name = name or ("50% skipped" if part == "BlockSkip" else "half skipped")
    found = [
        row["peak"] / GIB
        for row in map(json.loads, read("benchmarks/results/memory.jsonl").splitlines())
        if (row["part"], row["name"], row["weights_format"], row["size"]) == (part, name, weights, 256)
        and row["checkpointing"]
    ]
    return min(found)  # the same arm on the fly takes more


def test_the_readme_is_short():
    assert len(read("README.md").split()) <= MOST_WORDS


def test_the_readme_names_the_two_commands():
    assert "\n    python dev.py test\n    python dev.py demo\n" in read("README.md")


def test_the_readmes_memory_is_what_was_counted():
    text = " ".join(read("README.md").split())
    said = re.search(r"takes ([\d.]+) GiB in bf16, ([\d.]+) GiB in fp8 and ([\d.]+) GiB in 4-bit", text)
    formats = ("bf16", "fp8", "4-bit")
    assert list(said.groups()) == [f"{counted('BlockSkip', weights):.1f}" for weights in formats]
    ours = re.search(r"learns \[more\]\(#status-and-limits\) and takes ([\d.]+), ([\d.]+) or ([\d.]+) GiB", text)
    assert list(ours.groups()) == [f"{counted('BlockSkip', weights, DEFAULT):.1f}" for weights in formats]


def test_the_memory_of_every_family_is_what_was_counted():
    table = rows(read("docs/models.md").split("## Which format to load on which card")[0])
    for start, parts in KEPT_IN_MODELS.items():
        (row,) = [row for row in table if f"{row[0]} |".startswith(start)]
        for cell, name in ((row[3], DEFAULT), (row[4], "")):
            said = re.findall(r"[\d.]+, [\d.]+, [\d.]+ GiB", cell)
            formats = ("bf16", "fp8", "4-bit")
            expected = [", ".join(f"{counted(part, w, name):.1f}" for w in formats) + " GiB" for part in parts]
            assert said == expected, (row[0], name)


def test_which_way_fits_which_card_is_what_was_counted():
    shown = rows(section(read("docs/models.md"), "Which format to load on which card"))
    assert len(shown) > 5
    every = rows(section(read("benchmarks/results/memory.md"), "Which way fits which card"))
    assert all(row in every for row in shown)


def test_what_ralu_saves_is_what_was_counted():
    table = rows(section(read("MEASURED.md"), "Fast sampling: RALU"))
    operations = {row[0].split(",")[0]: int(row[3].split(",")[0]) for row in table if re.match(r"\d{3,}", row[-1])}
    share = operations["plain"] / operations["FLUX 5x"]
    for document in ("README.md", "docs/ralu.md"):
        text = " ".join(read(document).split())
        assert f"1/{share:.1f}" in text
        assert f"{50 / share:.1f} plain steps" in text
        assert f"1/{share * 20 / 50:.1f} of 20" in text


def test_troubleshooting_quotes_messages_as_the_code_says_them():
    quoted = [text for row in rows(read("docs/troubleshooting.md")) for text in re.findall(r"“(.+?)”", row[0])]
    assert len(quoted) >= 5
    known = messages()
    assert [q for q in quoted if q not in OF_OTHERS and not any(q in message for message in known)] == []


def test_the_page_on_diffusers_quotes_messages_as_the_code_says_them():
    quoted = re.findall(r"^\* `(.+?)`[:.]", section(read("docs/diffusers.md"), "What is refused"), re.MULTILINE)
    known = messages()
    assert len(quoted) == 12
    assert [q for q in quoted if not any(all(part in m for part in q.split("…")) for m in known)] == []


def test_the_models_page_names_every_training_template():
    text = " ".join(read("docs/models.md").split())
    named = re.search(r"Templates named \*BlockSkip 2 - Train …\* load (.+?) from the files", text)[1]
    start = "BlockSkip 2 - Train "
    shipped = {path.stem.removeprefix(start) for path in (ROOT / "workflows").glob(f"{start}*.json")}
    of_families = {name for name in shipped if not name.endswith(" GB")}
    assert {name.removesuffix(" 5B") for name in re.split(", | and ", named)} == of_families

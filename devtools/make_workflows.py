"""Writes the shipped workflows: ``python devtools/make_workflows.py SERVER`` (the address of a ComfyUI with the pack).

``workflow_graphs.py`` defines their content. ``check_workflow.mjs`` makes ComfyUI's real frontend convert the API
prompts to its own format; this adds positions, groups, notes and model links, and writes the twins that the tests run.
Run it again whenever a node's inputs change, then look at the thumbnails. ``--only WORDS`` writes only workflows whose
name contains WORDS.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any

from workflow_demo import DEMO
from workflow_edit import EDIT
from workflow_families import FAMILIES
from workflow_graphs import GRAPHS, Column, Graph
from workflow_stand_ins import twin_of
from workflow_thumbnails import draw

ROOT = Path(__file__).resolve().parents[1]
CHECKER = ROOT / "devtools" / "check_workflow.mjs"
TWINS = ROOT / "tests" / "workflows"
GAP, GROUP_TOP, TITLE = 40, 60, 30
NOTE_WIDTH, LINE, LETTER = 460, 16, 5.9  # px: a note's width, and the size of its lines and letters
NEVER = 2  # the mode of a muted node
SHOWS_TEXT = {  # px: nodes that grow by a few lines of text after a run
    "BlockSkip_LoadTrainingFolder": 60,
    "BlockSkip_PrecomputeResiduals": 90,
}
CURVE = 90  # px more for the chart than it must have
TALLER = 40  # px that a node of ours is taller with Nodes 2.0


def _files(directory: str, *paths: str) -> list[tuple[str, str, str]]:
    """Return (name, path, folder of ComfyUI) of files, by their paths on :data:`MODEL_SITE`."""
    return [(path.rpartition("/")[2], path, directory) for path in paths]


_COMFY = "Comfy-Org/{}/resolve/main/"
_QWEN, _QWEN_21, _KREA, _Z_IMAGE, _WAN_22, _MINIMAX = (
    _COMFY.format(name)
    for name in (
        "Qwen-Image_ComfyUI", "Qwen-Image-2.1", "Krea-2", "z_image_turbo", "Wan_2.2_ComfyUI_Repackaged", "MiniMax-H3"
    )
)  # fmt: skip
_QWEN_EDIT = f"{_COMFY.format('Qwen-Image-Edit_ComfyUI')}split_files/diffusion_models/qwen_image_edit_2509_fp8_e4m3fn.safetensors"
_FLUX_TEXT = "comfyanonymous/flux_text_encoders/resolve/main/"
_KLEIN = "black-forest-labs/FLUX.2-klein-base-4b-fp8/resolve/main/flux-2-klein-base-4b-fp8.safetensors"
_WAN_21 = _COMFY.format("Wan_2.1_ComfyUI_repackaged") + "split_files/"
_LTX_2 = "Lightricks/LTX-2/resolve/main/ltx-2-19b-dev-fp8.safetensors"
MODELS = {
    "UNETLoader": _files(
        "diffusion_models",
        f"{_COMFY.format('flux1-dev')}flux1-dev.safetensors",
        f"{_Z_IMAGE}split_files/diffusion_models/z_image_turbo_bf16.safetensors",
        f"{_QWEN}split_files/diffusion_models/qwen_image_fp8_e4m3fn.safetensors",
        _QWEN_EDIT,
        f"{_QWEN_21}diffusion_models/qwen_image_2.1_int8_convrot.safetensors",
        f"{_KREA}diffusion_models/krea2_turbo_int8_convrot.safetensors",
        _KLEIN,
        f"{_WAN_22}split_files/diffusion_models/wan2.2_ti2v_5B_fp16.safetensors",
        f"{_MINIMAX}diffusion_models/minimax_h3_fl2va_pruned_int8_convrot.safetensors",
    ),
    "CheckpointLoaderSimple": _files(
        "checkpoints",
        f"{_COMFY.format('flux1-dev')}flux1-dev-fp8.safetensors",
        f"{_COMFY.format('stable-diffusion-v1-5-archive')}v1-5-pruned-emaonly-fp16.safetensors",
        _LTX_2,
    ),
    "DualCLIPLoader": _files("text_encoders", f"{_FLUX_TEXT}clip_l.safetensors", f"{_FLUX_TEXT}t5xxl_fp16.safetensors"),
    "CLIPLoader": _files(
        "text_encoders",
        f"{_Z_IMAGE}split_files/text_encoders/qwen_3_4b.safetensors",
        f"{_QWEN}split_files/text_encoders/qwen_2.5_vl_7b_fp8_scaled.safetensors",
        f"{_QWEN_21}text_encoders/qwen3vl_8b_int8_convrot.safetensors",
        f"{_KREA}text_encoders/qwen3vl_4b_fp8_scaled.safetensors",
        f"{_WAN_21}text_encoders/umt5_xxl_fp8_e4m3fn_scaled.safetensors",
        f"{_MINIMAX}text_encoders/qwen3vl_32b_minimax_h3_nvfp4_awq.safetensors",
    ),
    "LTXAVTextEncoderLoader": [
        *_files(
            "text_encoders",
            f"{_COMFY.format('ltx-2')}split_files/text_encoders/gemma_3_12B_it_fp4_mixed.safetensors",
        ),
        *_files("checkpoints", _LTX_2),
    ],
    "VAELoader": _files(
        "vae",
        f"{_COMFY.format('Lumina_Image_2.0_Repackaged')}split_files/vae/ae.safetensors",
        f"{_QWEN}split_files/vae/qwen_image_vae.safetensors",
        f"{_QWEN_21}vae/qwen_image_2.1_vae_bf16.safetensors",
        f"{_COMFY.format('flux2-dev')}split_files/vae/flux2-vae.safetensors",
        f"{_WAN_22}split_files/vae/wan2.2_vae.safetensors",
        f"{_MINIMAX}vae/minimax_h3_video_vae_fp16.safetensors",
    ),
    "CLIPVisionLoader": _files("clip_vision", f"{_WAN_21}clip_vision/clip_vision_h.safetensors"),
}
MODEL_SITE = "https://huggingface.co/"
TOGETHER = {
    "flux1-dev-fp8.safetensors": "about 17 GB",
    "flux1-dev.safetensors": "about 34 GB",
    "v1-5-pruned-emaonly-fp16.safetensors": "about 2 GB",
    "z_image_turbo_bf16.safetensors": "about 21 GB",
    "qwen_image_fp8_e4m3fn.safetensors": "about 30 GB",
    "qwen_image_edit_2509_fp8_e4m3fn.safetensors": "about 30 GB",
    "qwen_image_2.1_int8_convrot.safetensors": "about 17 GB",
    "krea2_turbo_int8_convrot.safetensors": "about 19 GB",
    "flux-2-klein-base-4b-fp8.safetensors": "about 12 GB",
    "wan2.2_ti2v_5B_fp16.safetensors": "about 18 GB",
    "ltx-2-19b-dev-fp8.safetensors": "less than 46 GB",
    "minimax_h3_fl2va_pruned_int8_convrot.safetensors": "about 57 GB",
}
"""Model -> the size of it, its text encoders and its VAE, as ComfyUI's own templates with these files state it.

That of LTX-2 has further files; that of Qwen-Image 2.1 is the sum of the published files (7.26, 9.35 and 0.68 GB, read on 2026-11-30).
"""


def numbered(graph: Graph) -> dict[str, Any]:
    """The API prompt of a graph, with numbers instead of node names."""
    numbers = {name: str(number) for number, name in enumerate(graph.prompt, 1)}
    return {
        numbers[name]: {
            **spec,
            "inputs": {k: [numbers[v[0]], v[1]] if isinstance(v, list) else v for k, v in spec["inputs"].items()},
        }
        for name, spec in graph.prompt.items()
    }


def convert(server: str, graph: Graph, folder: Path) -> dict[str, Any]:
    """Make the frontend convert the prompt to a workflow, and add the nodes' names."""
    api, out = folder / "prompt.json", folder / "workflow.json"
    api.write_text(json.dumps(numbered(graph)), encoding="utf-8")
    # The user's models and folders are not among this server's choices, so the checker is expected to report them.
    done = subprocess.run(
        ["node", str(CHECKER), server, "--from-api", str(api), "--out", str(out), "--pack-version", _version()],
        check=False,
        capture_output=True,
        text=True,
    )
    if not out.is_file():
        raise RuntimeError(f"{graph.name} was not converted: {done.stdout}{done.stderr}")
    workflow = json.loads(out.read_text(encoding="utf-8"))
    names = list(graph.prompt)
    for made in workflow["nodes"]:
        made["name"] = names[int(made["id"]) - 1]
    return workflow


def _version() -> str:
    for line in (ROOT / "blockskip_core" / "version.py").read_text(encoding="utf-8").splitlines():
        if line.startswith("VERSION"):
            return line.split('"')[1]
    raise RuntimeError("version.py does not define VERSION.")


def arrange(workflow: dict[str, Any], graph: Graph) -> dict[str, Any]:
    """Place the nodes in their columns and add groups, notes and model links."""
    by_name = {made.pop("name"): made for made in workflow["nodes"]}
    links = _links(graph)
    note = f"{graph.note}\n\n{_files_note(links)}" if links else graph.note
    _add_note(workflow, "Read me", note, [0, GROUP_TOP], NOTE_WIDTH)
    left = NOTE_WIDTH + 2 * GAP
    deepest_note = max((_note_height(column.note, column.width) for column in graph.columns if column.note), default=0)
    workflow["groups"] = []
    for column in graph.columns:
        bottom = _fill(workflow, column, by_name, left, deepest_note)
        workflow["groups"].append(
            {
                "id": len(workflow["groups"]) + 1,
                "title": column.title,
                "bounding": [left - 15, -15, column.width + 30, bottom + 5],
                "color": column.colour,
                "flags": {},
            }
        )
        left += column.width + 30 + GAP
    for name, made in by_name.items():
        if name in graph.muted:
            made["mode"] = NEVER
        values = made.get("widgets_values") or []
        made["widgets_values"] = ["fixed" if value == "randomize" else value for value in values]  # keep the seeds
        if links.get(name):
            made["properties"]["models"] = links[name]
    workflow["extra"] = {
        "blockskipTemplate": True,  # web/js/fresh_templates.js gives what is opened from it an id of its own
        "ds": {"scale": 0.55, "offset": [60, 120]},
        "frontendVersion": workflow["extra"]["frontendVersion"],
    }
    return workflow


def _links(graph: Graph) -> dict[str, list[dict[str, str]]]:
    """The files of each loader in a shipped graph, as the frontend's dialog for missing models reads them."""
    if graph.folder != "workflows":
        return {}
    found = {
        name: [
            {"name": file, "url": MODEL_SITE + path, "directory": directory}
            for file, path, directory in MODELS.get(spec["class_type"], [])
            if file in spec["inputs"].values()
        ]
        for name, spec in graph.prompt.items()
    }
    return {name: links for name, links in found.items() if links}


def _files_note(links: dict[str, list[dict[str, str]]]) -> str:
    """The files with links, and their size together."""
    files = {link["name"]: link for each in links.values() for link in each}
    (size,) = (TOGETHER[name] for name in files if name in TOGETHER)
    rows = [f"* [{name}]({link['url']}) in models/{link['directory']}" for name, link in files.items()]
    return "\n".join([f"**Files**, {size} for model, text encoders and VAE:", "", *rows])


def _fill(workflow: dict[str, Any], column: Column, by_name: dict[str, Any], left: int, note_height: int) -> int:
    """Place a column's note and nodes and return where they end; all nodes begin below the longest note."""
    top = GROUP_TOP
    if column.note:
        _add_note(workflow, "", column.note, [left, top], column.width)
    if note_height:
        top += note_height + GAP + TITLE
    for name in column.nodes:
        made = by_name[name]
        height = _height(made)
        made["pos"], made["size"] = [left, top], [column.width, height]
        top += height + GAP + TITLE + SHOWS_TEXT.get(made["type"], 0) + TALLER * made["type"].startswith("BlockSkip_")
    return top - TITLE


def _height(made: dict[str, Any]) -> int:
    by_kind = {
        "PreviewImage": 300,
        "SaveImage": 420,
        "PreviewAny": 260,
        "LossGraphNode": 300,
        "BlockSkip_Compare": 480,
    }
    if made["type"] == "BlockSkip_TrainLora":
        return int(made["size"][1]) + CURVE
    return 130 if made["type"] == "CLIPTextEncode" else max(by_kind.get(made["type"], 0), int(made["size"][1]))


def _note_height(words: str, width: int) -> int:
    """The height that a note needs to show its whole text."""
    per_line = (width - 40) / LETTER
    paragraphs = re.sub(r"\]\([^)]+\)", "]", words).split("\n\n")
    lines = sum(
        math.ceil(len(part) / per_line)
        for paragraph in paragraphs
        for part in (paragraph.split("\n") if paragraph.startswith("* ") else [paragraph])
    )
    return 30 + lines * LINE + len(paragraphs) * 8 + 30 * words.startswith("#")


def _add_note(workflow: dict[str, Any], title: str, words: str, place: list[int], width: int) -> None:
    workflow["last_node_id"] += 1
    words = "\n\n".join(_flowing(paragraph) for paragraph in words.split("\n\n"))
    words = re.sub(r"`([^`]+)`", r"**\1**", words)  # Nodes 2.0 shows code in blue, which is unreadable on a brown note
    workflow["nodes"].append(
        {
            "id": workflow["last_node_id"],
            "type": "MarkdownNote",
            "pos": place,
            "size": [width, max(_note_height(words, width), 360 if title == "Read me" else 0)],
            "flags": {},
            "order": 0,
            "mode": 0,
            "inputs": [],
            "outputs": [],
            "title": title or "What happens here",
            "properties": {},
            "widgets_values": [words],
            "color": "#432",
            "bgcolor": "#653",
        }
    )


def _flowing(paragraph: str) -> str:
    """A paragraph without the line breaks of the source; a list keeps its line breaks."""
    lines = paragraph.split("\n")
    return (
        paragraph if lines[0][:1].isdigit() or lines[0].startswith("* ") else " ".join(line.strip() for line in lines)
    )


def write(server: str, graph: Graph) -> None:
    """Write a workflow, its thumbnail and its twin."""
    with tempfile.TemporaryDirectory() as folder:
        workflow = arrange(convert(server, graph, Path(folder)), graph)
    target = ROOT / graph.folder / f"{graph.name}.json"
    target.parent.mkdir(exist_ok=True)
    if target.exists():  # keep the id, so that it remains the same workflow for users who have it open
        workflow["id"] = json.loads(target.read_text(encoding="utf-8"))["id"]
    target.write_text(json.dumps(workflow, indent=1) + "\n", encoding="utf-8")
    if graph.twin:
        twin = twin_of(numbered(graph))
        (TWINS / f"{graph.twin}.api.json").write_text(json.dumps(twin, indent=1) + "\n", encoding="utf-8")
    with tempfile.TemporaryDirectory() as folder:
        picture = Path(folder) / "graph.png"
        subprocess.run(
            ["node", str(CHECKER), server, str(target), "--screenshot", str(picture), "--size", "1400x800"], check=False
        )
        draw(graph, picture).save(target.with_suffix(".jpg"), quality=88)


def main() -> None:
    """Write every workflow, or only the requested ones."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("server")
    parser.add_argument("--only", default="", metavar="WORDS")
    options = parser.parse_args()
    for graph in (*GRAPHS, *FAMILIES, EDIT, DEMO):
        if options.only in graph.name:
            write(options.server, graph)


if __name__ == "__main__":
    main()

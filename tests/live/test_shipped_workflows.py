"""The shipped workflows: opened in the real frontend, and their twins run with the demo's small models.

The frontend's prompt of a shipped workflow, with the small models inserted, must equal the twin. So these tests run
what a user would run.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from .conftest import ROOT, WORKFLOWS, browser_or_skip, load_devtool
from .test_workflows import output_of, part_of, pixels, succeed

SHIPPED = sorted(ROOT.glob("workflows/*.json"))


@pytest.fixture(scope="module")
def maker() -> ModuleType:
    """``devtools/make_workflows.py``, which imports modules in its folder."""
    for name in (
        "workflow_graphs", "workflow_families", "workflow_edit", "workflow_demo", "workflow_stand_ins", "workflow_thumbnails",
    ):  # fmt: skip
        sys.modules[name] = load_devtool(name)
    return load_devtool("make_workflows")


@pytest.fixture(scope="module")
def graphs(maker: ModuleType) -> dict[str, Any]:
    """The graphs by name."""
    return {graph.name: graph for graph in (*maker.GRAPHS, *maker.FAMILIES, maker.EDIT)}


@pytest.fixture(scope="module")
def prompts(server: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the frontend would queue for each shipped workflow, by name; opens them all with both kinds of nodes."""
    browser_or_skip()
    folder = tmp_path_factory.mktemp("prompts")
    pictures = os.environ.get("BLOCKSKIP_SCREENSHOTS")
    for kind in ("classic", "vue"):
        command = ["node", str(ROOT / "devtools" / "check_workflow.mjs"), server.url, *map(str, SHIPPED)]
        command += ["--api-outs", str(folder)] if kind == "classic" else ["--vue"]
        if pictures:
            (Path(pictures) / kind).mkdir(parents=True, exist_ok=True)
            command += ["--screenshots", str(Path(pictures) / kind)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
        assert done.returncode == 0, f"{kind} nodes:\n{done.stdout}\n{done.stderr}"
        assert done.stdout.count(": 0 problem(s)") == len(SHIPPED)
    return {path.stem: json.loads((folder / path.name).read_text(encoding="utf-8")) for path in SHIPPED}


def test_every_workflow_is_written_down_and_shipped(graphs: dict[str, Any]) -> None:
    assert sorted(graphs) == sorted(path.stem for path in SHIPPED)


def test_the_frontend_opens_every_workflow_without_a_complaint(prompts: dict[str, Any], graphs: dict[str, Any]) -> None:
    """No missing node, no console error, no changed value: `prompts` asserts this. And all nodes are queued."""
    for name, prompt in prompts.items():
        assert len(prompt) == len(graphs[name].prompt) - len(graphs[name].muted)


def test_what_the_frontend_queues_is_what_is_written_down(
    prompts: dict[str, Any], graphs: dict[str, Any], maker: ModuleType
) -> None:
    for name, graph in graphs.items():
        muted = {str(place) for place, node in enumerate(graph.prompt, 1) if node in graph.muted}
        expected = {key: spec for key, spec in maker.numbered(graph).items() if key not in muted}
        for key, spec in expected.items():
            queued = prompts[name][key]
            assert queued["class_type"] == spec["class_type"]
            assert {k: queued["inputs"].get(k) for k in spec["inputs"]} == spec["inputs"], f"{name}: {spec['_meta']}"


def test_the_twins_are_up_to_date(graphs: dict[str, Any], maker: ModuleType) -> None:
    for graph in graphs.values():
        if graph.twin:
            twin = json.loads((WORKFLOWS / f"{graph.twin}.api.json").read_text(encoding="utf-8"))
            assert twin == maker.twin_of(maker.numbered(graph)), "run devtools/make_workflows.py"


RUN = {
    "my_first_lora": 71, "train_8_gb": 72, "train_12_gb": 73, "train_24_gb": 74, "z_image_turbo": 76, "qwen_image": 77,
    "qwen_image_edit": 78, "ltx_2": 79, "train_6_gb": 81, "train_16_gb": 82,
}  # fmt: skip


def apart_from_name_and_cfg(prompt: dict[str, Any]) -> list[Any]:
    """A family's twin without its title, the name of its LoRA, and the CFG of its samples."""
    left_out = {"BlockSkip_TrainLora": "output_name", "BlockSkip_SampleWhileTraining": "cfg"}
    return [
        (key, spec["class_type"], {k: v for k, v in spec["inputs"].items() if k != left_out.get(spec["class_type"])})
        for key, spec in sorted(prompt.items())
    ]


def test_a_twin_that_is_not_run_is_one_that_is_run_under_another_name(
    load_workflow: Callable[..., Any], maker: ModuleType
) -> None:
    twins = {graph.twin for graph in maker.FAMILIES}
    run = [apart_from_name_and_cfg(load_workflow(twin)) for twin in twins & RUN.keys()]
    assert [twin for twin in twins - RUN.keys() if apart_from_name_and_cfg(load_workflow(twin)) not in run] == []


@pytest.mark.parametrize(("twin", "seed"), RUN.items(), ids=list(RUN))
def test_a_twin_plans_trains_and_samples(client: Any, load_workflow: Callable[..., Any], twin: str, seed: int) -> None:
    prompt = load_workflow(twin, {"Dynamic Patch Trainer": {"seed": seed}})  # or one would resume another's run
    result = succeed(client, prompt)
    summary = output_of(result, prompt, "Dynamic Patch Trainer")["blockskip"][0]
    assert (summary["steps"], summary["problems"]) == (4, [])
    assert summary["self_check"] < 0.1  # the last blocks are in 4-bit
    assert output_of(result, prompt, "Memory Plan: will it fit?")["blockskip_plan"][0]["fits"] is True
    assert output_of(result, prompt, "Dynamic Patch Trainer")["blockskip_chart"][0]["samples"]
    titles = {node["_meta"]["title"] for node in prompt.values()}
    for title in titles & {"Which blocks are skipped", "What training will see", "Plot Loss Graph", "Your subject"}:
        assert output_of(result, prompt, title)["images"], title


def test_a_cards_resume_template_continues_its_run(client: Any, load_workflow: Callable[..., Any]) -> None:
    seed = {"seed": 75}
    first = load_workflow("train_12_gb", {"Dynamic Patch Trainer": seed})
    assert output_of(succeed(client, first), first, "Dynamic Patch Trainer")["blockskip"][0]["steps"] == 4
    prompt = load_workflow("resume_12_gb", {"Continue: more steps": {**seed, "steps": 6}})
    more = output_of(succeed(client, prompt), prompt, "Continue: more steps")["blockskip"][0]
    assert (more["resumed_at"], more["steps"]) == (4, 6)


def test_the_twin_of_dynamic_patches_trains_and_samples(client: Any, load_workflow: Callable[..., Any]) -> None:
    first_coarse = {"Dynamic Patches (DDiT)": {"first_own": 0}}  # of two steps, every other one
    prompt = load_workflow("dynamic_patches", first_coarse)
    result = succeed(client, prompt)
    assert output_of(result, prompt, "Errors by noise level")["images"]
    assert "Operations of a coarse step" in output_of(result, prompt, "What is planned")["text"][0]
    node = next(key for key, own in prompt.items() if own["_meta"]["title"] in first_coarse)
    strips = [event for event in result.of_kind("preview") if event.data["display_node_id"] == node]
    assert len(strips) == 2, "one for each step of the sampler"
    states = [event.data["nodes"].get(node, {}) for event in result.of_kind("progress_state")]
    assert [state["state"] for state in states if (state.get("value"), state.get("max")) == (1, 2)][0] == "running"
    assert (states[-1]["state"], states[-1]["max"]) == ("finished", 2)
    coarse = pixels(client.view(output_of(result, prompt, "Picture")["images"][0]))
    own = load_workflow("dynamic_patches", {"Dynamic Patches (DDiT)": {"mode": "off"}})
    plain = pixels(client.view(output_of(succeed(client, own), own, "Picture")["images"][0]))
    assert coarse.shape == plain.shape
    assert (coarse != plain).any()


def test_adapters_from_a_file_sample_as_those_that_were_just_trained(
    client: Any, load_workflow: Callable[..., Any]
) -> None:
    """The training's twin saves them, the other one loads them; of two steps the first is coarse."""
    first_coarse = {"Dynamic Patches (DDiT)": {"first_own": 0}}
    training = load_workflow("dynamic_patches", first_coarse)
    teacher = next(key for key, own in training.items() if own["class_type"] == "BlockSkip_TrainDDiT")
    look = {"class_type": "PreviewAny", "inputs": {"source": [teacher, 2]}, "_meta": {"title": "look"}}
    done = succeed(client, {**training, "look": look})
    saved, *about = done.outputs["look"]["text"][0].splitlines()
    (file,) = re.fullmatch(r"Saved (patch_adapters_\d+_\.safetensors) in loras\.", saved).groups()
    prompt = load_workflow("use_patch_adapters", {**first_coarse, "Load Patch Adapters": {"file": file}})
    result = succeed(client, prompt)
    assert output_of(result, prompt, "About these adapters")["text"][0].splitlines() == about
    assert "Operations of a coarse step" in output_of(result, prompt, "What is planned")["text"][0]
    trained, loaded = (
        pixels(client.view(output_of(made, graph, "Picture")["images"][0]))
        for made, graph in ((done, training), (result, prompt))
    )
    assert (loaded == trained).all()
    compared = output_of(result, prompt, "Compare Pictures")
    before, after = (pixels(client.view(compared[f"blockskip_{which}"][0])) for which in ("before", "after"))
    assert before.shape == after.shape == loaded.shape
    assert (before != after).any(), "plain steps beside coarse ones"
    with pytest.raises(load_devtool("comfy_client").RequestRefused, match="No file was chosen"):
        client.queue(load_workflow("use_patch_adapters"))


def test_the_command_of_run_outside_trains(client: Any, load_workflow: Callable[..., Any]) -> None:
    prompt = load_workflow("run_outside")
    (command,) = output_of(succeed(client, prompt), prompt, "The command")["text"]
    done = subprocess.run(shlex.split(command), cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "4 steps; saved as my_subject_" in done.stdout


def test_several_subjects_keep_their_captions(client: Any, load_workflow: Callable[..., Any]) -> None:
    prompt = load_workflow("several_subjects")
    titles = {node["_meta"]["title"]: key for key, node in prompt.items()}
    look = {
        "texts": {"class_type": "PreviewAny", "inputs": {"source": [titles["All captions"], 0]}},
        "images": {"class_type": "PreviewImage", "inputs": {"images": [titles["All pictures"], 0]}},
    }
    folders = [titles[f"Pictures of the {which} subject"] for which in ("first", "second")]
    for number, folder in enumerate(folders):
        look[f"own {number}"] = {"class_type": "PreviewImage", "inputs": {"images": [folder, 0]}}
    for node in look.values():
        node["_meta"] = {"title": "look"}
    result = succeed(client, {**prompt, **look})
    texts = result.outputs["texts"]["text"]
    assert [text.split(",")[0] for text in texts] == ["toby", "toby", "mila", "mila"]
    assert ["toby" in text.split(", ", 1)[1] for text in texts] == [True, True, False, False], (
        "the folder's own caption"
    )
    together = [pixels(client.view(image)) for image in result.outputs["images"]["images"]]
    apart = [pixels(client.view(image)) for number in range(2) for image in result.outputs[f"own {number}"]["images"]]
    assert len(together) == len(apart) == 4
    assert all((one == other).all() for one, other in zip(together, apart, strict=True))
    assert output_of(result, prompt, "Dynamic Patch Trainer")["blockskip"][0]["steps"] == 4
    assert output_of(result, prompt, "Both of them")["images"]


def test_resume_goes_on_with_the_run_of_the_training_workflow(
    client: Any, load_workflow: Callable[..., Any], graphs: dict[str, Any], maker: ModuleType
) -> None:
    first = maker.twin_of(maker.numbered(graphs["BlockSkip 8 - Train FLUX.1 LoRA (paper)"]))
    done = output_of(succeed(client, first), first, "Dynamic Patch Trainer")["blockskip"][0]
    longer = {"Continue: more steps": {"steps": 6}, "Train a LoRA file further": {"start_file": done["file"]}}
    prompt = load_workflow("resume", longer)
    result = succeed(client, prompt)
    more = output_of(result, prompt, "Continue: more steps")["blockskip"][0]
    assert (more["resumed_at"], more["steps"]) == (4, 6)
    further = output_of(result, prompt, "Train a LoRA file further")["blockskip"][0]
    assert (further["resumed_at"], further["steps"], further["problems"]) == (0, 4, [])


@pytest.mark.parametrize("twin", ["train_word", "train_word_flux"])
def test_a_word_is_learned_saved_and_sampled_with(client: Any, load_workflow: Callable[..., Any], twin: str) -> None:
    prompt = load_workflow(twin, {"Train Word (ZOODiP)": {"name": f"live/{twin}", "seed": 75}})
    result = succeed(client, prompt)
    report = output_of(result, prompt, "Report")["text"][0]
    word = report.split()[1]
    assert word.startswith(f"embedding:live/{twin}_0000")
    chart = output_of(result, prompt, "Train Word (ZOODiP)")["blockskip_chart"][0]
    assert (chart["step"], chart["status"], len(chart["points"])) == (2, "done", 2)
    learned = pixels(client.view(output_of(result, prompt, "Your subject")["images"][0]))
    typed = load_workflow(twin, {"Prompt": {"text": f"a big orange {word}"}})
    part = part_of(typed, "Your subject")
    assert not any(node["class_type"] == "BlockSkip_TrainWord" for node in part.values())
    again = pixels(client.view(output_of(succeed(client, part), typed, "Your subject")["images"][0]))
    assert (learned == again).all(), "a prompt with the file is what the run ended with"


def test_the_twins_run_on_the_oldest_supported_comfyui(older: Any, load_workflow: Callable[..., Any]) -> None:
    client = load_devtool("comfy_client").ComfyClient(older.url)
    for twin in ("my_first_lora", "several_subjects"):
        prompt = load_workflow(twin)
        summary = output_of(succeed(client, prompt), prompt, "Dynamic Patch Trainer")["blockskip"][0]
        assert summary["steps"] == 4
    prompt = load_workflow("train_word")
    assert output_of(succeed(client, prompt), prompt, "Report")["text"][0].startswith("Write embedding:my_word_")


def test_a_format_that_the_oldest_comfyui_lacks_is_refused_with_what_to_do(
    older: Any, load_workflow: Callable[..., Any]
) -> None:
    """Our templates were saved with a newer one, whose default for frozen blocks is int8."""
    client = load_devtool("comfy_client").ComfyClient(older.url)
    prompt = load_workflow("my_first_lora", {"Dynamic Patch Trainer": {"quantize_frozen": "int8"}})
    answer = client.post("/prompt", {"prompt": prompt, "client_id": client.client_id})
    client.stop()  # the host runs what is connected to other outputs
    said = {error["details"] for node in answer["node_errors"].values() for error in node["errors"]}
    assert any(
        "quantize_frozen 'int8' is not a format of this ComfyUI" in text and "Choose one of these" in text
        for text in said
    ), said

"""What the demo queues, what it refuses before it starts a server, and what it writes."""

from __future__ import annotations

import importlib
import io
from pathlib import Path
from types import ModuleType

import pytest
from PIL import Image

ROOT = Path(__file__).resolve().parents[2]
TEXTS = ["a big orange toby circle on water, right", "a big orange toby circle on bricks, left"]


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The demo's script, which imports the tools in its folder."""
    monkeypatch.syspath_prepend(str(ROOT / "devtools"))
    return importlib.import_module("demo")


@pytest.fixture
def prompt(script: ModuleType) -> dict:
    """The demo's workflow."""
    return script.load_prompt(script.WORKFLOW)


def titles(prompt: dict) -> list[str]:
    return [node["_meta"]["title"] for node in prompt.values()]


def test_every_text_is_sampled_before_and_after(script: ModuleType, prompt: dict) -> None:
    several = script.with_prompts(prompt, TEXTS)
    added = set(titles(several)) - set(titles(prompt))
    assert added == {
        "Prompt 2",
        "Sample before 2",
        "Decode before 2",
        "Before 2",
        "Sample after 2",
        "Decode after 2",
        "After 2",
    }
    by_title = {node["_meta"]["title"]: (key, node["inputs"]) for key, node in several.items()}
    assert [by_title[name][1]["text"] for name in ("Prompt", "Prompt 2")] == TEXTS
    assert by_title["Sample after 2"][1]["positive"] == [by_title["Prompt 2"][0], 0]
    assert by_title["Sample after 2"][1]["model"] == by_title["Sample after"][1]["model"]
    assert by_title["After 2"][1]["images"] == [by_title["Decode after 2"][0], 0]


def test_the_workflow_itself_is_left_alone(script: ModuleType, prompt: dict) -> None:
    before = script.json.dumps(prompt)
    script.with_prompts(prompt, TEXTS)
    assert script.json.dumps(prompt) == before


def test_every_caption_of_the_demo_is_known_to_the_world(script: ModuleType, demo, world: ModuleType) -> None:
    for subject in world.SUBJECTS.values():
        for place in script.PLACES:
            words = f"{subject} {place}".replace(",", " ,").split()
            assert set(words) <= set(world.VOCABULARY)
            assert place.split()[1].strip(",") in world.HELD_OUT_GROUNDS


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--subject", "bob"], "There is no subject 'bob': choose one of toby, mila, pip, zuzu, nori."),
        (["--pictures", "EMPTY"], "There is no picture in"),
    ],
)
def test_what_cannot_be_taught_is_refused_before_anything_starts(
    script: ModuleType, arguments: list[str], sentence: str, tmp_path: Path, monkeypatch, capsys
) -> None:
    monkeypatch.setenv("COMFYUI_PATH", str(tmp_path))
    arguments = [str(tmp_path) if word == "EMPTY" else word for word in arguments]
    assert script.main([*arguments, "--output", str(tmp_path / "out")]) == 1
    assert sentence in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_results_show_every_text_and_the_training_pictures(script: ModuleType, prompt: dict, tmp_path: Path) -> None:
    report = importlib.import_module("demo_report")
    several = script.with_prompts(prompt, TEXTS)
    outputs = {key: {"images": [{"key": key}]} for key in several}
    picture = io.BytesIO()
    Image.new("RGB", (64, 64), "red").save(picture, "PNG")
    shown, folder = tmp_path / "shown", tmp_path / "out"
    for made in (shown, folder):
        made.mkdir()
    (shown / "01.png").write_bytes(picture.getvalue())
    (tmp_path / "one.safetensors").touch()
    fetched = []

    def view(reference: dict) -> bytes:
        fetched.append(several[reference["key"]]["_meta"]["title"])
        return picture.getvalue()

    report.write(folder, several, outputs, view, [tmp_path / "one.safetensors"], {"steps": 3}, shown)
    assert {"Before", "After", "Before 2", "After 2"} <= set(fetched)
    with Image.open(folder / "before_after.png") as sheet:
        assert sheet.height > 128 + 2 * 64
    assert {path.name for path in folder.iterdir()} == {
        "one.safetensors", "before_after.png", "summary.md", *report.PICTURES.values()
    }  # fmt: skip


@pytest.mark.parametrize(
    "damage", [lambda data: data[:-1], lambda data: b"", lambda data: b"<html>" + data], ids=["cut", "empty", "page"]
)
def test_a_damaged_weights_file_is_named_before_anything_starts(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, damage
) -> None:
    (whole,) = script.demo_models()["text_encoders"]
    damaged = tmp_path / "text.safetensors"
    damaged.write_bytes(damage(whole.read_bytes()))
    monkeypatch.setenv("COMFYUI_PATH", str(tmp_path))
    monkeypatch.setattr(script, "demo_models", lambda: {"text_encoders": [damaged]})
    with pytest.raises(script.DemoProblem, match=r"text\.safetensors is damaged .* Get the repository's copy again"):
        script.requirements(script.WORKFLOW)


def test_the_shipped_weights_are_whole(script: ModuleType) -> None:
    for files in script.demo_models().values():
        for file in files:
            script.require_whole(file)


def test_the_parts_of_a_nodes_work_are_told_apart(script: ModuleType) -> None:
    """The two bars of one node: crops, then residuals; the trainer's bar needs no name."""
    stream = io.StringIO()
    line = script.ProgressLine({"7": "Prepare", "8": "Train"}, stream)
    events = [("executing", {"node": "7"})]
    for work, total in (("encoding crops", 2), ("computing residuals", 24)):
        for done in (1, 2):
            events.append(("text", {"node": "7", "text": f"{work}: {done} of {total} · more"}))
            events.append(("progress", {"node": "7", "value": done, "max": total}))
    events += [("text", {"node": "7", "text": "Size 256 px."}), ("progress", {"node": "8", "value": 1, "max": 9})]
    for kind, data in events:
        line(script.Event(kind, data))
    told = [text.split(" s  ")[1] for text in stream.getvalue().splitlines()]
    assert told == ["Prepare", "Prepare, encoding crops  1/2", "Prepare, computing residuals  1/24", "Train  1/9"]


def test_a_stopped_demo_keeps_what_it_made_and_says_where(script: ModuleType, tmp_path: Path, capsys) -> None:
    source, target = tmp_path / "server", tmp_path / "out"
    for name in (
        "loras/toby_00001_.safetensors", "loras/toby_00001_.html", "blockskip/before_00001_.png",
        "blockskip/residuals/ab/0.safetensors", "blockskip/runs/cd/step_00000010.safetensors", "loras/.lock",
    ):  # fmt: skip
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).touch()
    stopped = []

    class Client:
        def stop(self) -> None:
            stopped.append(True)
            raise ConnectionRefusedError  # the server has ended too

    made = script.MadeFiles(source, target)
    script.keep_rest(Client(), made)
    kept = ["blockskip/before_00001_.png", "loras/toby_00001_.html", "loras/toby_00001_.safetensors"]
    assert stopped == [True]
    assert capsys.readouterr().out == f"\nMade so far, and kept in {target}: {', '.join(kept)}\n"
    assert sorted(file.relative_to(target).as_posix() for file in target.rglob("*.*")) == kept
    (source / "loras" / "shown.png").touch()
    made.leave_out_present()
    (source / "loras" / "later.safetensors").touch()
    script.keep_rest(Client(), made)
    assert capsys.readouterr().out == f"\nMade so far, and kept in {target}: loras/later.safetensors\n"
    script.keep_rest(Client(), made)
    assert capsys.readouterr().out == ""

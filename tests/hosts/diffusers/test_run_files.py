"""Run files for diffusers: written here, trained by the command, the same LoRA as in Python; refused if anything differs."""

from __future__ import annotations

import json
import sys

import pytest
import torch
from blockskip_pack import blockskip_core as blockskip
from blockskip_pack.blockskip_core.errors import BlockSkipError, InvalidInputError, StorageError
from blockskip_pack.blockskip_core.hosts import diffusers as host
from blockskip_pack.blockskip_core.hosts.diffusers.from_file import DiffusersHost
from blockskip_pack.blockskip_core.runs.command import main
from blockskip_pack.blockskip_core.runs.host import Places, host_named
from blockskip_pack.blockskip_core.runs.named_folders import NamedFolders
from blockskip_pack.blockskip_core.runs.run_file import RunFile
from blockskip_pack.blockskip_core.training.together import Together
from safetensors.torch import load_file

from ...core.processes import in_processes, needs_fork
from .tiny_models import FLUX, PLAN
from .tiny_pipelines import build

SPANS = blockskip.BlockSelection(front=1, back=1, num_blocks=5, family="flux")
CONFIG = blockskip.TrainingConfig(steps=4, learning_rate=1e-2, accumulation=2)
LORA = blockskip.LoraSettings(rank=2, alpha=6.0)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    build("flux").save_pretrained(folder / "tiny")
    return folder


@pytest.fixture(scope="module")
def dit(models):
    return host.DiffusersDit(host.load_transformer(models / "tiny"), FLUX.captions())


@pytest.fixture(scope="module")
def examples():
    return blockskip.Examples(PLAN, FLUX.clean_latents())


@pytest.fixture
def run(tmp_path, dit, examples):
    """A run file in a folder of its own, and an output folder beside it."""
    (tmp_path / "output").mkdir()
    (tmp_path / "runs").mkdir()
    return written(tmp_path / "runs" / "run.json", dit, examples)


def written(path, dit, examples, **settings):
    files = host.RunFiles(output_name="loras/tiny", save_every=1)
    host.write_run(path, dit, examples, SPANS, CONFIG, folder="tiny", lora=LORA, files=files, **settings)
    return path


def train(run, models, *more):
    return main([str(run), "--models", str(models), "--output", str(run.parents[1] / "output"), *more])


def saved(run):
    return sorted((run.parents[1] / "output" / "loras").glob("*"))


@pytest.mark.parametrize("storage", ["disk", "chunked", "on the fly"])
def test_the_command_trains_the_same_lora_to_the_bit(tmp_path, models, dit, examples, storage):
    from blockskip_pack.blockskip_core.residuals.sources import FoldedSource

    for name in ("output", "runs"):
        (tmp_path / name).mkdir()
    run = written(tmp_path / "runs" / "run.json", dit, examples, storage=storage, chunk_size=4)
    assert train(run, models, "--", "--device", "cpu") == 0
    residuals = FoldedSource() if storage == "on the fly" else None
    lora = blockskip.train(dit, examples, SPANS, CONFIG, lora=LORA, layers=dit.lora_layers(SPANS), residuals=residuals)
    host.save_lora(lora, tmp_path / "expected.safetensors")
    (file,) = saved(run)
    assert file.name == "tiny_00001.safetensors"
    ours, expected = load_file(file), load_file(tmp_path / "expected.safetensors")
    assert ours.keys() == expected.keys()
    assert all(torch.equal(ours[name], tensor) for name, tensor in expected.items())


def test_a_finished_run_is_continued_from_its_last_state(run, models, capsys):
    assert train(run, models) == 0
    assert train(run, models) == 0
    first, second = map(load_file, saved(run))
    assert all(torch.equal(first[name], tensor) for name, tensor in second.items())
    assert capsys.readouterr().out.count("The LoRA is ") == 2


@needs_fork
@pytest.mark.parametrize("storage", ["disk", "on the fly"])
def test_two_processes_train_the_lora_of_one_to_the_bit(tmp_path, models, dit, examples, storage):
    """Which also means that both agree on the run, that one of them writes, and that no lock or part is left."""
    files = []
    for size in (1, 2):
        folder = tmp_path / str(size)
        for name in ("output", "runs"):
            (folder / name).mkdir(parents=True)
        run = written(folder / "runs" / "run.json", dit, examples, storage=storage)
        ended = in_processes(folder / "meeting", size, lambda _together, run=run: train(run, models))
        assert [(each.result, each.error) for each in ended] == [(0, "")] * size
        (file,) = saved(run)
        files.append(load_file(file))
    one, two = files
    assert one.keys() == two.keys()
    assert all(torch.equal(two[name], tensor) for name, tensor in one.items())


def test_the_help_names_what_this_host_takes(capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    assert "diffusers' --device NAME" in " ".join(capsys.readouterr().out.split())


class Shown:
    """Progress that may stop a run."""

    def __init__(self, last=99):
        self.last, self.said = last, []

    def __call__(self, phase, done, total, detail=""):
        if phase == "steps" and done == self.last:
            raise KeyboardInterrupt

    def say(self, text):
        self.said.append(text)


def prepared(run, models, shown, together):
    places = Places(
        program=None, models=NamedFolders([models], "--models"), data=NamedFolders([run.parent], "--data"),
        output=run.parents[1] / "output",
    )  # fmt: skip
    opened = DiffusersHost()
    opened.start(places, ())
    return opened.prepare(RunFile.read(run), places, shown, together)


def test_a_stopped_run_is_saved_as_it_is_and_continues(run, models):
    shown = Shown(last=2)
    with pytest.raises(KeyboardInterrupt):
        prepared(run, models, shown, Together()).train()
    (early,) = saved(run)
    assert shown.said == [f"The LoRA is {early}."]
    assert train(run, models) == 0
    for folder in ("again/runs", "again/output"):
        (run.parents[1] / folder).mkdir(parents=True)
    again = run.parents[1] / "again" / "runs" / "run.json"
    for file in run.parent.iterdir():
        (again.parent / file.name).write_bytes(file.read_bytes())
    assert train(again, models) == 0
    (whole,) = saved(again)
    continued, whole, early = load_file(saved(run)[1]), load_file(whole), load_file(early)
    assert all(torch.equal(continued[name], tensor) for name, tensor in whole.items())
    assert not all(torch.equal(early[name], tensor) for name, tensor in whole.items())


def test_a_lora_that_cannot_be_saved_hides_no_other_error(run, models, monkeypatch, caplog):
    from blockskip_pack.blockskip_core.hosts.diffusers import from_file

    def full(*_arguments):
        raise StorageError("the disk is full")

    monkeypatch.setattr(from_file, "save_lora", full)
    with pytest.raises(KeyboardInterrupt):
        prepared(run, models, Shown(last=2), Together()).train()
    assert "The LoRA so far is not saved: the disk is full" in caplog.text
    with pytest.raises(StorageError, match="the disk is full"):
        prepared(run, models, Shown(), Together()).train()
    assert saved(run) == []


def test_an_output_that_cannot_be_written_is_refused_before_training(run, models, capsys):
    (run.parents[1] / "output" / "loras").touch()
    assert train(run, models) == 1
    assert "could not be created" in capsys.readouterr().out
    assert [path.name for path in (run.parents[1] / "output").iterdir()] == ["loras"]


class Second(Together):
    """A process that is not the first, alone."""

    rank = 1


def test_only_the_first_process_writes(run, models):
    prepared(run, models, Shown(), Second()).train()
    assert not (run.parents[1] / "output" / "loras").exists()
    ours, theirs = (prepared(run, models, Shown(), each()).agreed for each in (Second, Together))
    assert ours == theirs
    assert ours["number of steps"] == 4
    assert "scale" in ours


def changed(run, change):
    content = json.loads(run.read_text(encoding="utf-8"))
    change(content)
    run.write_text(json.dumps(content), encoding="utf-8")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda run: run["model"].update(folder="../tiny"), "which could lead out of the folders named with --models"),
        (lambda run: run["model"].update(folder="other"), "There is no file other/model_index.json"),
        (lambda run: run["model"].update(dtype="int8"), "dtype in model must be one of float32, bfloat16, float16"),
        (lambda run: run["model"].update(dtype="bfloat16"), "tiny is not the model that this run was written for"),
        (lambda run: run["settings"].update(more={}), "settings has more, which this version does not know"),
        (lambda run: run["settings"].pop("training"), "training in settings must be a JSON object"),
        (lambda run: run["settings"]["files"].update(output_name="../x"), "output_name must be letters, digits"),
        (lambda run: run["settings"]["lora"].update(rank=0), "The rank must be at least 1"),
        (lambda run: run["residuals"]["identity"].update(captions="0"), "has other captions than the run file says"),
        (lambda run: run["residuals"]["identity"].update(pictures="0"), "has other latents than the run file says"),
    ],
)
def test_what_does_not_fit_is_refused_and_nothing_is_written(run, models, capsys, change, message):
    changed(run, change)
    assert train(run, models) == 1
    assert message in capsys.readouterr().out
    assert list((run.parents[1] / "output").iterdir()) == []


@pytest.fixture
def cached(models, tmp_path):
    """The pipeline as the hub's cache stores it: every file under its hash, with links from the folders."""
    (tmp_path / "hub" / "blobs").mkdir(parents=True)
    for number, path in enumerate(sorted(path for path in (models / "tiny").rglob("*") if path.is_file())):
        blob = tmp_path / "hub" / "blobs" / f"{number:064x}"
        blob.write_bytes(path.read_bytes())
        link = tmp_path / "hub" / "tiny" / path.relative_to(models / "tiny")
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(blob)
    return tmp_path / "hub"


@pytest.mark.skipif(sys.platform == "win32", reason="links need rights there")
def test_a_pipeline_in_the_hubs_cache(run, cached):
    prepared(run, cached, Shown(), Together())


@pytest.mark.skipif(sys.platform == "win32", reason="links need rights there")
def test_a_transformer_outside_the_named_folders(run, models, cached, capsys):
    (cached / "tiny" / "transformer").rename(cached.parent / "elsewhere")
    (cached / "tiny" / "transformer").symlink_to(cached.parent / "elsewhere", target_is_directory=True)
    assert train(run, cached) == 1
    assert "tiny/transformer is a link to " in capsys.readouterr().out


def test_arguments_and_folders_are_checked(run, models):
    places = Places(None, NamedFolders([models], "--models"), NamedFolders([], "--data"), run.parent / "nowhere")
    with pytest.raises(InvalidInputError, match="--output must be a folder that exists"):
        host_named("diffusers").start(places, ())
    there = Places(None, places.models, places.data, run.parent)
    with pytest.raises(InvalidInputError, match="diffusers takes --device NAME after --, .* got --cpu"):
        host_named("diffusers").start(there, ("--cpu",))


def test_a_model_in_another_dtype_cannot_be_written(tmp_path, examples):
    dit = FLUX.hosted(FLUX.build(dtype=torch.float64))
    with pytest.raises(InvalidInputError, match="must be in float32, bfloat16 or float16, got float64"):
        written(tmp_path / "run.json", dit, examples)
    assert not list(tmp_path.iterdir())


def test_a_transformer_alone_is_loaded_by_the_rules_of_pipelines(models, tmp_path):
    assert host.load_transformer(models / "tiny", dtype=torch.bfloat16).dtype == torch.bfloat16
    index = json.loads((models / "tiny" / "model_index.json").read_text(encoding="utf-8"))
    for described, message in ((["code", "X"], "needs code from code"), (None, "needs code from None")):
        (tmp_path / "model_index.json").write_text(json.dumps({**index, "transformer": described}), encoding="utf-8")
        with pytest.raises(BlockSkipError, match=message):
            host.load_transformer(tmp_path)
    (tmp_path / "transformer").symlink_to(models / "tiny" / "transformer", target_is_directory=True)
    described = {**index, "transformer": ["diffusers", "AuraFlowTransformer2DModel"]}
    (tmp_path / "model_index.json").write_text(json.dumps(described), encoding="utf-8")
    with pytest.raises(BlockSkipError, match="Expected a transformer of one of diffusers' classes .* AuraFlow"):
        host.load_transformer(tmp_path)

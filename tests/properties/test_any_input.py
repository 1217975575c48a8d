"""With any input, a node succeeds or explains in one sentence why not.

And with any input, no file is written outside ComfyUI's folders, and the MODEL's weights and modules are unchanged.
"""

from __future__ import annotations

import hashlib
import shutil
from types import SimpleNamespace

import pytest
import torch
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st

from ..nodes.conftest import Listed, TinyVae
from . import strategies

WIDTH = 16  # of a text's tokens
LONGEST_SENTENCE = 1500


class World(SimpleNamespace):
    """The nodes' arguments. Hypothesis shows this object with every failing example, so its repr is short."""

    def __repr__(self):
        return "world"


@pytest.fixture(scope="module")
def world(nodes, core, tiny, run_node, tmp_path_factory):
    """A model, its inputs, and a folder in which every change is noticed."""
    import folder_paths

    pictures = core("reporting.pictures")
    sandbox = tmp_path_factory.mktemp("sandbox")
    base = sandbox / "comfyui"
    (base / "output" / "loras").mkdir(parents=True)
    (base / "temp").mkdir()
    (base / "input" / "toy").mkdir(parents=True)
    (sandbox / "beside").mkdir()
    for file in (base / "input" / "toy" / "a.png", sandbox / "beside" / "b.png"):
        pictures.as_picture(torch.rand(40, 50, 3)).save(file)
    model = tiny.tiny_flux()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(folder_paths, "output_directory", str(base / "output"))
        patch.setattr(folder_paths, "temp_directory", str(base / "temp"))
        patch.setattr(folder_paths, "input_directory", str(base / "input"))
        loras = ([str(base / "output" / "loras")], {".safetensors"})
        patch.setitem(folder_paths.folder_names_and_paths, "loras", loras)
        patch.setattr(folder_paths, "filename_list_cache", {})
        found = World(
            sandbox=sandbox, base=base, model=model, vae=TinyVae(), caption=tiny.captions((5,))[0], nodes=nodes, core=core,
            run_node=run_node,
        )  # fmt: skip
        found.selection = call(found, nodes.SelectBlocks, **SELECT, model=model, positive=[found.caption])[0]
        found.residuals = call(
            found, nodes.PrecomputeResiduals, **PRECOMPUTE, model=model, vae=found.vae, images=[torch.rand(1, 64, 64, 3)],
            positive=[found.caption], selection=found.selection,
        )[0]  # fmt: skip
        found.lora = dict(call(found, nodes.TrainLora, **TRAIN, model=model, residuals=found.residuals)[0])
        prompts = tiny.captions((5, 5))
        found.patch_adapters = call(found, nodes.TrainPatchAdapters, **TRAIN_PATCHES, model=model, positive=prompts)[0]
        found.before = state_of(found)
        yield found


SELECT = {"method": "manual", "skip_ratio": 0.5, "front": 2, "back": 1}
PRECOMPUTE = {"draws": 2, "patch_min": 32, "patch_max": 32, "storage": "on the fly", "seed": 3}
TRAIN_PATCHES = {
    "patch_sizes": "2x", "width": 64, "height": 64, "max_steps": 1, "peak_learning_rate": 1e-3, "batch_size": 1, "seed": 0,
    "adapters_name": "loras/patches", "pictures_per_prompt": 1, "sampler_steps": 1, "lora_rank": 2,
}  # fmt: skip
TRAIN = {"steps": 1, "learning_rate": 1e-3, "rank": 2, "seed": 5}


def call(world, node, **inputs):
    """Call a node as ComfyUI does; for a node that takes lists, a single value becomes a list."""
    if node.INPUT_IS_LIST:
        inputs = {name: Listed(value if isinstance(value, list) else [value]) for name, value in inputs.items()}
    return world.run_node(node, **inputs)


def state_of(world):
    """What must not change: the model's weights and modules, and every file outside of output and temp."""
    digest = hashlib.blake2b()
    for name, tensor in world.model.model.state_dict().items():
        digest.update(name.encode())
        digest.update(tensor.detach().contiguous().view(torch.uint8).numpy().tobytes())
    modules = [(name, id(module)) for name, module in world.model.model.named_modules()]
    attached = (dict(world.model.object_patches), dict(world.model.patches), len(world.model.wrappers))
    inside = {world.base / "output", world.base / "temp"}
    files = sorted(str(path) for path in world.sandbox.rglob("*") if not inside & {path, *path.parents})
    above = sorted(path.name for path in world.sandbox.parent.iterdir())
    return digest.hexdigest(), modules, attached, files, above


def holds(world, node, **inputs):
    """Call a node with any input; see the module's docstring."""
    outcome, sentence = "success", ""
    try:
        call(world, node, **inputs)
    except world.core("errors").BlockSkipError as error:
        outcome, sentence = type(error).__name__, str(error)
    assert (outcome == "success") == (sentence == "")
    assert len(sentence) < LONGEST_SENTENCE
    event(f"{node.__name__}: {outcome}")
    assert state_of(world) == world.before
    for path in (world.base / "output").iterdir():
        if path.name != "loras":
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    for path in (world.base / "output" / "loras").iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    return outcome


def examples(count):
    """Hypothesis settings with this number of examples."""
    return settings(max_examples=count, suppress_health_check=list(HealthCheck))


@examples(105)
@given(data=st.data())
def test_select_blocks(world, data):
    node = world.nodes.SelectBlocks
    usual = {
        "method": st.sampled_from(["preset", "manual"]), "front": st.integers(0, 3), "back": st.integers(0, 2),
        "skip_ratio": st.floats(0.0, 0.8),
    }  # fmt: skip
    inputs = {
        "model": strategies.socket(world.model),
        "positive": strategies.conditionings(WIDTH),
        "vae": strategies.socket(world.vae, optional=True),
        "clip_vision": strategies.Input(st.just(None), strategies.STRANGERS, optional=True),
        **strategies.widgets(node, usual),
    }
    values = strategies.drawn(data, inputs)
    if values["method"] == "attention mask":
        values.update(probe_size=32, probe_steps=1, probe_seeds=1)
    holds(world, node, **values)


@examples(35)
@given(data=st.data())
def test_select_blocks_that_measures(world, data):
    node = world.nodes.SelectBlocks
    usual = {
        "probe_size": st.just(32), "probe_steps": st.just(1), "skip_ratio": st.floats(0.0, 0.4), "window_profile": st.just(False),
        "method": st.just("attention mask"),
    }  # fmt: skip
    inputs = {
        "model": strategies.socket(world.model),
        "positive": strategies.conditionings(WIDTH),
        "negative": strategies.conditionings(WIDTH, optional=True),
        **strategies.widgets(node, usual),
    }
    inputs.pop("probe_seeds")
    values = {"probe_size": 32, "probe_steps": 1, **strategies.drawn(data, inputs)}
    if isinstance(values["probe_size"], int) and 64 < values["probe_size"] <= 2048:
        values["probe_size"] = 64  # allowed, and slow
    holds(world, node, **values)


@examples(10)
@given(data=st.data())
def test_memory_plan(world, data):
    node = world.nodes.MemoryPlan
    usual = {
        "patch_min": st.sampled_from([16, 32, 48]), "rank": st.integers(1, 8), "batch_size": st.integers(1, 2),
        "probe_size": st.just(64), "draws": st.integers(1, 9), "card_memory": st.sampled_from([0.0, 8.0]),
        "use_spare": st.just(False),
    }  # fmt: skip
    inputs = {
        "model": strategies.socket(world.model),
        "positive": strategies.conditionings(WIDTH),
        "selection": strategies.socket(world.selection),
        "references": strategies.pictures(optional=True),
        **strategies.widgets(node, usual),
    }
    holds(world, node, **strategies.drawn(data, inputs))


@examples(90)
@given(data=st.data())
def test_precompute_residuals(world, data):
    node = world.nodes.PrecomputeResiduals
    usual = {
        "draws": st.integers(1, 3), "patch_min": st.just(32), "patch_max": st.sampled_from([32, 48]),
        "chunk_size": st.integers(1, 3), "storage": st.sampled_from(["disk", "chunked", "on the fly"]),
        "timestep_shift": st.floats(0.01, 100.0), "seed": st.integers(0, 2**64 - 1),
    }  # fmt: skip
    inputs = {
        "model": strategies.socket(world.model),
        "vae": strategies.socket(world.vae),
        "images": strategies.pictures(),
        "positive": strategies.conditionings(WIDTH),
        "selection": strategies.socket(world.selection),
        "files": strategies.Input(st.just([]), st.lists(strategies.STRANGERS, max_size=2), optional=True),
        "references": strategies.pictures(optional=True),
        "memory_settings": strategies.Input(st.just(None), strategies.STRANGERS, optional=True),
        **strategies.widgets(node, usual),
    }
    holds(world, node, **strategies.drawn(data, inputs))


@examples(70)
@given(data=st.data())
def test_dynamic_patch_trainer(world, data):
    node = world.nodes.TrainLora
    usual = {
        "steps": st.integers(1, 2), "learning_rate": st.floats(1e-8, 1.0), "rank": st.integers(1, 3),
        "seed": st.integers(0, 2**64 - 1), "accumulation": st.integers(1, 2), "batch_size": st.integers(1, 2),
        "output_name": st.just("loras/toy"), "alpha": st.floats(0.0, 64.0),
    }  # fmt: skip
    inputs = {
        "model": strategies.socket(world.model),
        "residuals": strategies.socket(world.residuals),
        "start_from": strategies.Input(st.just(None), strategies.loras(world.lora), optional=True),
        "samples": strategies.Input(st.just(None), strategies.STRANGERS, optional=True),
        "memory_settings": strategies.Input(st.just(None), strategies.STRANGERS, optional=True),
        **strategies.widgets(node, usual),
    }
    holds(world, node, **strategies.drawn(data, inputs))


@examples(30)
@given(lora=st.data())
def test_a_lora_to_start_from(world, lora):
    start = lora.draw(strategies.loras(world.lora))
    holds(world, world.nodes.TrainLora, **TRAIN, model=world.model, residuals=world.residuals, start_from=start)


@examples(90)
@given(data=st.data())
def test_apply_lora(world, data):
    inputs = {
        "model": strategies.socket(world.model),
        "strength_model": strategies.Input(st.floats(-10.0, 10.0), strategies.ODD_NUMBERS | strategies.STRANGERS),
        "lora": strategies.Input(strategies.loras(world.lora), strategies.STRANGERS, optional=True),
        "lora_name": strategies.Input(st.just("none"), strategies.NAMES | strategies.STRANGERS, optional=True),
    }
    holds(world, world.nodes.ApplyLora, **strategies.drawn(data, inputs, most_odd=1))


@examples(20)
@given(data=st.data())
def test_compare_pictures(world, data):
    images = strategies.pictures()
    one = strategies.Input(
        *(each.map(lambda found: found[0] if found else None) for each in (images.usual, images.odd))
    )
    holds(world, world.nodes.ComparePictures, **strategies.drawn(data, {"before": one, "after": one}))


@examples(40)
@given(data=st.data())
def test_sample_while_training(world, data):
    node = next(node for node in world.nodes.NODE_CLASSES if node.__name__ == "SampleWhileTraining")
    inputs = {
        "positive": strategies.conditionings(WIDTH),
        "negative": strategies.conditionings(WIDTH, optional=True),
        "vae": strategies.socket(world.vae),
        **strategies.widgets(node, {"width": st.just(64), "height": st.just(64)}),
    }
    holds(world, node, **strategies.drawn(data, inputs))


@examples(40)
@given(data=st.data())
def test_ralu_sampler(world, data):
    node = world.nodes.RaluSampler
    usual = {
        "preset": st.just("custom"), "custom_steps": st.sampled_from(["1, 1, 1", "2, 1", "1"]),
        "custom_ends": st.sampled_from(["0.3, 0.45, 1", "0.4, 1", "1"]), "regions": st.just("latent gradient"),
        "upsample_ratio": st.floats(0.0, 1.0),
    }  # fmt: skip
    latents = {"samples": torch.zeros(1, 4, 8, 8)}
    odd_latents = st.fixed_dictionaries(
        {}, optional={"samples": strategies.odd_tensors() | strategies.STRANGERS, "batch_index": strategies.STRANGERS}
    )
    inputs = {
        "model": strategies.socket(world.model),
        "positive": strategies.conditioning(WIDTH),
        "latent_image": strategies.Input(st.just(latents), odd_latents | strategies.STRANGERS),
        "vae": strategies.Input(st.just(None), strategies.STRANGERS, optional=True),
        "mask": strategies.Input(
            st.just(torch.ones(1, 8, 8)), strategies.odd_tensors() | strategies.STRANGERS, optional=True
        ),
        **strategies.widgets(node, usual),
    }
    holds(world, node, **strategies.drawn(data, inputs))


@examples(10)
@given(data=st.data())
def test_train_patch_adapters(world, data):
    node = world.nodes.TrainPatchAdapters
    usual = {
        "patch_sizes": st.just("2x"), "width": st.just(64), "height": st.just(64), "max_steps": st.just(1),
        "pictures_per_prompt": st.just(1), "sampler_steps": st.just(1), "adapters_name": st.just("loras/patches"),
        "batch_size": st.just(1), "cfg": st.just(1.0), "lora_rank": st.just(2), "scheduler": st.just("simple"),
        "peak_learning_rate": st.just(1e-3),
    }  # fmt: skip
    inputs = {
        "model": strategies.socket(world.model),
        "positive": strategies.conditionings(WIDTH),
        "negative": strategies.conditionings(WIDTH, optional=True),
        **strategies.widgets(node, usual),
    }
    holds(world, node, **strategies.drawn(data, inputs))


@examples(40)
@given(data=st.data())
def test_dynamic_patches(world, data):
    node = world.nodes.DynamicPatchesNode
    usual = {"windows": st.sampled_from(["", "2-3: 2", "1: 2, 4: 2"]), "error_budget": st.floats(0.0, 1.0)}
    inputs = {
        "model": strategies.socket(world.model),
        "patch_adapters": strategies.socket(world.patch_adapters, optional=True),
        "sigmas": strategies.Input(
            st.just(torch.linspace(1, 0, 6)), strategies.odd_tensors() | strategies.STRANGERS, optional=True
        ),
        **strategies.widgets(node, usual),
    }
    holds(world, node, **strategies.drawn(data, inputs))


@examples(20)
@given(name=strategies.NAMES)
def test_load_patch_adapters(world, name):
    holds(world, world.nodes.LoadPatchAdapters, file=name)


@examples(20)
@given(folder=strategies.NAMES | strategies.STRANGERS | st.sampled_from(["toy", "../beside"]))
def test_a_reference_folder(world, folder):
    outcome = holds(world, world.nodes.LoadTrainingFolder, folder="toy", reference_folder=folder)
    assert outcome == ("success" if folder == "none" else "InvalidInputError")


@examples(35)
@given(name=strategies.NAMES, absolute=st.booleans())
def test_a_name_reaches_no_other_folder(world, name, absolute):
    """Absolute names point to a watched folder outside ComfyUI's."""
    name = f"{world.sandbox}/beside/{name}" if absolute else name
    outcome = holds(
        world, world.nodes.TrainLora, **TRAIN, model=world.model, residuals=world.residuals, output_name=name
    )
    assert not absolute or ".." in name or outcome == "InvalidInputError"


@examples(50)
@given(
    folder=strategies.NAMES
    | strategies.STRANGERS
    | st.sampled_from(["toy", "toy/", "./toy", "../beside", "toy/../../beside"])
)
def test_load_training_folder(world, folder):
    outcome = holds(world, world.nodes.LoadTrainingFolder, folder=folder)
    assert outcome == ("success" if folder in ("toy", "toy/", "./toy") else "InvalidInputError")

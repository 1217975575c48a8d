"""What saved workflows and other packs rely on: node ids, inputs, outputs, and that every one of them is explained."""

from __future__ import annotations

import dataclasses
import inspect
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

# Never remove or rename an entry: saved workflows name them. New inputs are optional.
CONTRACT = {
    "BlockSkip_SelectBlocks": {
        "required": {
            "model": "MODEL", "positive": "CONDITIONING", "method": "COMBO", "skip_ratio": "FLOAT", "front": "INT",
            "back": "INT",
        },
        "optional": {"vae": "VAE", "clip_vision": "CLIP_VISION"},
        "outputs": [("selection", "BLOCKSKIP_SELECTION"), ("heatmap", "IMAGE"), ("report", "STRING")],
        "lists": True,
    },
    "BlockSkip_MemoryPlan": {
        "required": {
            "model": "MODEL", "positive": "CONDITIONING", "selection": "BLOCKSKIP_SELECTION", "patch_min": "INT",
            "draws": "INT", "storage": "COMBO", "rank": "INT", "batch_size": "INT", "checkpointing": "BOOLEAN",
            "quantize_kept": "COMBO", "activation_budget": "FLOAT", "card_memory": "FLOAT",
        },
        "optional": {"preset": "COMBO"},
        "outputs": [
            ("report", "STRING"), ("fits", "BOOLEAN"), ("chart", "IMAGE"), ("settings", "BLOCKSKIP_MEMORY"),
        ],
        "lists": True,
    },
    "BlockSkip_PrecomputeResiduals": {
        "required": {
            "model": "MODEL", "vae": "VAE", "images": "IMAGE", "positive": "CONDITIONING",
            "selection": "BLOCKSKIP_SELECTION", "draws": "INT", "patch_min": "INT", "patch_max": "INT",
            "storage": "COMBO", "seed": "INT",
        },
        "optional": {"memory_settings": "BLOCKSKIP_MEMORY"},
        "outputs": [("residuals", "BLOCKSKIP_RESIDUALS"), ("patches", "IMAGE")],
        "lists": True,
    },
    "BlockSkip_SampleWhileTraining": {
        "required": {
            "positive": "CONDITIONING", "vae": "VAE", "every": "INT", "at_start": "BOOLEAN", "width": "INT",
            "height": "INT", "sampler_steps": "INT", "cfg": "FLOAT", "scheduler": "COMBO", "seed": "INT",
        },
        "optional": {"negative": "CONDITIONING", "memory_budget": "FLOAT"},
        "outputs": [("samples", "BLOCKSKIP_SAMPLES")],
        "lists": True,
    },
    "BlockSkip_TrainLora": {
        "required": {
            "model": "MODEL", "residuals": "BLOCKSKIP_RESIDUALS", "steps": "INT", "learning_rate": "FLOAT",
            "rank": "INT", "seed": "INT",
        },
        "optional": {
            "quantize_kept": "COMBO", "samples": "BLOCKSKIP_SAMPLES", "memory_settings": "BLOCKSKIP_MEMORY",
        },
        "outputs": [("lora", "LORA_MODEL"), ("loss_map", "LOSS_MAP"), ("steps", "INT")],
        "lists": True,
    },
    "BlockSkip_ApplyLora": {
        "required": {"model": "MODEL", "strength_model": "FLOAT"},
        "optional": {"lora": "LORA_MODEL", "lora_name": "COMBO"},
        "outputs": [("model", "MODEL"), ("info", "STRING")],
        "lists": False,
    },
    "BlockSkip_RALUSampler": {
        "required": {
            "model": "MODEL", "positive": "CONDITIONING", "latent_image": "LATENT", "seed": "INT", "cfg": "FLOAT",
            "preset": "COMBO", "upsample_ratio": "FLOAT", "regions": "COMBO",
        },
        "optional": {
            "negative": "CONDITIONING", "vae": "VAE", "mask": "MASK", "custom_steps": "STRING", "custom_ends": "STRING",
            "custom_shift": "FLOAT",
        },
        "outputs": [("latent", "LATENT"), ("early_regions", "IMAGE"), ("report", "STRING")],
        "lists": False,
    },
}  # fmt: skip
IDS = list(CONTRACT)
WIDGETS = ("INT", "FLOAT", "STRING", "BOOLEAN", "COMBO")  # inputs that need no cable


@pytest.fixture(scope="module")
def by_id(nodes):
    return {node.GET_SCHEMA().node_id: node for node in nodes.NODE_CLASSES}


@pytest.fixture
def node(by_id, request):
    return by_id[request.param]


def each_node(test):
    return pytest.mark.parametrize("node", IDS, indirect=True)(test)


def parameters_read(nodes, node):
    """Return what a node reads, by name: parameters of its ``execute`` and, for ``**widgets``, of whom it hands on to."""
    own = dict(inspect.signature(node.execute).parameters)
    rest = own.pop("widgets", None)
    if rest is None:
        return own
    assert rest.kind is inspect.Parameter.VAR_KEYWORD
    handed_on = {
        nodes.SelectBlocks: [nodes.select_blocks._Settings],
        nodes.MemoryPlan: [nodes.memory_plan._Plan],
        nodes.PrecomputeResiduals: [nodes.precompute_residuals._schedule],
        nodes.TrainLora: [nodes.run.training_run.TrainingRun, nodes.run.training_run.TrainingConfig],
    }[node]
    read = {}
    for reader in handed_on:
        parameters = inspect.signature(reader).parameters.values()
        if not dataclasses.is_dataclass(reader) and reader is not nodes.select_blocks._Settings:
            parameters = [p for p in parameters if p.kind is inspect.Parameter.KEYWORD_ONLY]
        read.update({parameter.name: parameter for parameter in parameters})
    if node is nodes.PrecomputeResiduals:  # read by `execute` itself, out of its widgets
        for name, default in (
            ("storage", inspect.Parameter.empty), ("chunk_size", 64), ("back_residual", "constant"),
            ("residual_format", "exact"), ("memory_settings", None),
        ):  # fmt: skip
            read[name] = inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default)
    assert not set(own) & set(read)
    return {**own, **read}


def test_the_nodes_are_these(by_id):
    assert set(IDS) <= set(by_id)


@each_node
def test_inputs_and_outputs_are_those_of_the_contract(node):
    schema = node.GET_SCHEMA()
    contract = CONTRACT[schema.node_id]
    required = {i.id: i.get_io_type() for i in schema.inputs if not i.optional}
    optional = {i.id: i.get_io_type() for i in schema.inputs if i.optional}
    assert required == contract["required"]
    assert contract["optional"].items() <= optional.items()
    assert [(output.id, output.get_io_type()) for output in schema.outputs] == contract["outputs"]
    assert bool(schema.is_input_list) == contract["lists"]


@each_node
def test_required_inputs_come_before_the_optional_ones_that_need_no_cable(node):
    """A new widget goes to the end: saved workflows store widget values by position."""
    widgets = [i for i in node.GET_SCHEMA().inputs if i.get_io_type() in WIDGETS]
    assert widgets
    assert sorted(widgets, key=lambda i: bool(i.optional)) == widgets


@each_node
def test_schema_and_code_name_the_same_inputs(nodes, node):
    assert {i.id for i in node.GET_SCHEMA().inputs} == set(parameters_read(nodes, node))


@each_node
def test_an_optional_input_may_be_absent_and_is_then_what_the_widget_shows(nodes, node):
    read = parameters_read(nodes, node)
    for entry in node.GET_SCHEMA().inputs:
        if not entry.optional:
            continue
        default = read[entry.id].default
        assert default is not inspect.Parameter.empty, entry.id
        if entry.get_io_type() in WIDGETS:
            assert default == entry.default, entry.id


def test_the_chunk_size_of_an_old_prompt_is_what_the_widget_shows(nodes, bench):
    schema = nodes.PrecomputeResiduals.GET_SCHEMA()
    shown = next(entry.default for entry in schema.inputs if entry.id == "chunk_size")
    assert bench.precompute(storage="on the fly")[0].chunk_size == shown == 64


def test_queueing_checks_no_input_by_catching_all_names(by_id):
    """ComfyUI drops its own range checks for every input that ``validate_inputs`` names, ``**kwargs`` meaning all."""
    for node in by_id.values():
        if "validate_inputs" in vars(node):
            kinds = {p.kind for p in inspect.signature(node.validate_inputs).parameters.values()}
            assert inspect.Parameter.VAR_KEYWORD not in kinds


def test_every_node_is_explained(by_id):
    for node_id, node in by_id.items():
        schema = node.GET_SCHEMA()
        for what in ("display_name", "category", "description", "search_aliases"):
            assert getattr(schema, what), f"{node_id} has no {what}"
        for entry in [*schema.inputs, *schema.outputs]:
            assert entry.tooltip, f"{node_id}.{entry.id} has no tooltip"
        assert all(output.display_name == output.id for output in schema.outputs)


def test_every_node_id_may_stand_in_an_address(by_id):
    """The frontend asks for ``docs/<node id>.md`` without escaping."""
    for node_id in by_id:
        assert node_id.replace("_", "").isalnum()
        assert node_id.isascii()


def test_every_widget_default_is_allowed_by_its_own_limits(by_id):
    for node in by_id.values():
        for entry in node.GET_SCHEMA().inputs:
            kind = entry.get_io_type()
            if kind in ("INT", "FLOAT"):
                assert entry.min <= entry.default <= entry.max, entry.id
            if kind == "COMBO":
                assert entry.default in entry.options, entry.id

"""What saved workflows and other packs rely on: node ids, inputs, outputs, and an explanation for each of them."""

from __future__ import annotations

import dataclasses
import inspect

import pytest

from .contract import CONTRACT, WIDGETS, line

IDS = list(CONTRACT)
WITHOUT_WIDGETS = ("BlockSkip_AcceptEmbeddings", "BlockSkip_Compare")
OF_THEIR_OWN = ("cfg", "preset")  # the same name with different meanings


@pytest.fixture(scope="module")
def by_id(nodes):
    return {node.GET_SCHEMA().node_id: node for node in nodes.NODE_CLASSES}


@pytest.fixture
def node(by_id, request):
    return by_id[request.param]


def each_node(test):
    return pytest.mark.parametrize("node", IDS, indirect=True)(test)


def requests(nodes):
    """Return the class that a node's ``**settings`` become, by node."""
    from blockskip_pack.blockskip_core.hosts.models.prepare import ResidualSettings
    from blockskip_pack.blockskip_core.hosts.runs.request import RunRequest
    from blockskip_pack.blockskip_core.hosts.sampling.training_samples import SampleRequest

    return {
        nodes.SelectBlocks: nodes.select_blocks.Choice,
        nodes.MemoryPlan: nodes.memory_plan.PlanRequest,
        nodes.PrecomputeResiduals: ResidualSettings,
        nodes.SampleWhileTraining: SampleRequest,
        nodes.TrainLora: RunRequest,
        nodes.WriteRun: RunRequest,
        nodes.RaluSampler: nodes.ralu_sampler.RaluRequest,
        nodes.TrainWord: nodes.words.request.WordRequest,
        nodes.TrainPatchAdapters: nodes.train_patch_adapters.TrainPatchesRequest,
        nodes.DynamicPatchesNode: nodes.dynamic_patches.DynamicPatchesRequest,
    }


def defaults_read(nodes, node):
    """Return a node's named parameters with defaults: of its ``execute`` and of the request that settings become."""
    absent = inspect.Parameter.empty
    read = {name: parameter.default for name, parameter in inspect.signature(node.execute).parameters.items()}
    if read.pop("settings", None) is None:
        return read
    for field in dataclasses.fields(requests(nodes)[node]):
        default = absent if field.default is dataclasses.MISSING else field.default
        assert default in (absent, read.setdefault(field.name, default)), field.name
    if node is nodes.PrecomputeResiduals:
        read["memory_settings"] = (
            inspect.signature(nodes.precompute_residuals.residual_settings).parameters["memory_settings"].default
        )
    if node is nodes.SampleWhileTraining:  # these have different names in the core
        read["sampler_steps"] = read.pop("steps")
        del read["budget_bytes"], read["likeness"]
    if node is nodes.WriteRun:  # it writes a request that has none
        del read["samples"]
    return read


def test_the_nodes_are_these(by_id):
    """A new node needs an entry in the contract."""
    assert sorted(IDS) == sorted(by_id)


@each_node
def test_inputs_are_those_of_the_contract_in_its_order(node):
    schema = node.GET_SCHEMA()
    promised = [text.strip() for text in CONTRACT[schema.node_id].inputs.strip().splitlines()]
    assert [line(entry) for entry in schema.inputs] == promised


@each_node
def test_outputs_are_those_of_the_contract(node):
    schema = node.GET_SCHEMA()
    assert [(output.id, output.get_io_type()) for output in schema.outputs] == CONTRACT[schema.node_id].outputs
    assert bool(schema.is_input_list) == CONTRACT[schema.node_id].takes_lists


def test_an_input_of_several_nodes_is_the_same_at_each():
    """Memory Plan has the same settings as the other nodes; only which inputs are optional differs."""
    found = {}
    for contract in CONTRACT.values():
        for text in contract.inputs.strip().splitlines():
            name, kind, *rest = text.split()
            if kind.rstrip("?") in WIDGETS and name not in OF_THEIR_OWN:
                found.setdefault(name, set()).add((kind.rstrip("?"), *rest))
    assert {name: kinds for name, kinds in found.items() if len(kinds) > 1} == {}
    assert len(found) > 50


@each_node
def test_required_inputs_come_before_the_optional_ones_that_need_no_cable(node):
    """A new widget goes to the end: saved workflows store widget values by position."""
    widgets = [i for i in node.GET_SCHEMA().inputs if i.get_io_type() in WIDGETS]
    assert widgets or node.GET_SCHEMA().node_id in WITHOUT_WIDGETS
    assert sorted(widgets, key=lambda i: bool(i.optional)) == widgets


@each_node
def test_schema_and_code_name_the_same_inputs(nodes, node):
    assert {i.id for i in node.GET_SCHEMA().inputs} == set(defaults_read(nodes, node))


@each_node
def test_an_optional_input_may_be_absent_and_is_then_what_the_widget_shows(nodes, node):
    read = defaults_read(nodes, node)
    for entry in node.GET_SCHEMA().inputs:
        if not entry.optional:
            continue
        default = read[entry.id]
        assert default is not inspect.Parameter.empty, entry.id
        if entry.get_io_type() in WIDGETS:
            assert default == entry.default, entry.id


def test_the_chunk_size_of_an_old_prompt_is_what_the_widget_shows(nodes, bench):
    schema = nodes.PrecomputeResiduals.GET_SCHEMA()
    shown = next(entry.default for entry in schema.inputs if entry.id == "chunk_size")
    assert bench.precompute(storage="on the fly")[0].chunk_size == shown == 64


def test_queueing_checks_no_input_by_catching_all_names(by_id):
    """ComfyUI skips its own range checks for every input that ``validate_inputs`` names; ``**kwargs`` means all."""
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
    """The frontend requests ``docs/<node id>.md`` without escaping."""
    for node_id in by_id:
        assert node_id.replace("_", "").isalnum()
        assert node_id.isascii()


def test_every_widget_default_is_allowed_by_its_own_limits(by_id):
    for node in by_id.values():
        for entry in node.GET_SCHEMA().inputs:
            kind = entry.get_io_type()
            if kind in ("INT", "FLOAT"):
                assert entry.min <= entry.default <= entry.max, entry.id
            if kind == "COMBO" and entry.default is not None:  # without a default the page shows the first
                assert entry.default in entry.options, entry.id

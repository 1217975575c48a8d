"""The plan of a run, through the node, compared with the run itself."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from blockskip_pack.blockskip_core.units import format_bytes

from .conftest import Listed

GIB = 2**30

PLAN = {
    "back_residual": "constant",
    "patch_min": 32, "draws": 6, "storage": "disk", "rank": 4, "batch_size": 1, "checkpointing": True,
    "quantize_kept": "off", "activation_budget": 0.0, "card_memory": 0.0, "chunk_size": 4, "probe_size": 64,
}  # fmt: skip


@pytest.fixture
def plan(bench, nodes, run_node):
    def run(**changes):
        selection = changes.pop("selection", None) or bench.select()[0]
        ordinary = {"model": bench.model, "positive": bench.prompt, "selection": selection}
        return run_node(nodes.MemoryPlan, **{**ordinary, **PLAN, **changes})

    return run


def planned_run(bench, nodes, selection, **changes):
    """The function behind the node."""
    request = nodes.memory_plan.PlanRequest(**{**PLAN, **changes})
    return nodes.memory_plan.Plan(bench.model, [bench.prompt], selection, request, lambda *_: None)


def test_a_small_run_fits_this_machine(plan):
    text, enough, chart, _ = plan().args
    assert enough is True
    assert ": fits." in text.splitlines()[0]
    assert {line.split(":")[0] for line in text.splitlines()} >= {
        "choosing blocks", "precomputing", "training", "host memory besides the model", "disk", "work",
    }  # fmt: skip
    assert chart.shape[0] == 1
    assert chart.shape[-1] == 3
    assert chart.min() >= 0
    assert chart.max() <= 1


@pytest.mark.parametrize(
    ("sizes", "captions", "changes"),
    [("2x", 1, {}), ("4x", 3, {"checkpointing": False}), ("2x and 4x", 2, {"batch_size": 2, "targets": "mlp"})],
)
def test_training_patch_adapters_is_counted_as_its_own_node_counts_it(bench, nodes, plan, sizes, captions, changes):
    from blockskip_pack.blockskip_core.hosts.sampling.patch_training import counted_peak

    given = {**PLAN, "patch_min": 64, **changes}
    training = nodes.train_patch_adapters.TrainPatchesRequest(
        patch_sizes=sizes, width=64, height=64, max_steps=30, peak_learning_rate=1e-3, batch_size=given["batch_size"], seed=1,
        adapters_name="loras/a", lora_rank=given["rank"], lora_targets=given.get("targets", "attention and mlp"),
        checkpointing=given["checkpointing"],
    ).training  # fmt: skip
    expected = counted_peak(bench.model, [bench.prompt] * max(2, captions), None, training)
    positive = Listed([bench.prompt] * captions)
    without = plan(positive=positive, **given)
    counted = plan(positive=positive, coarse_patches=sizes, **given)
    shown, before = (result.ui["blockskip_plan"][0] for result in (counted, without))
    assert shown["as_set"]["phases"] == {**before["as_set"]["phases"], "patch adapters": expected}
    assert (shown["as_set"]["peak"], shown["fits"]) == (before["as_set"]["peak"], True)
    line = f"patch adapters, {sizes}, trained by Train Patch Adapters: {format_bytes(expected)} on the device, fits."
    assert line in counted.args[0].splitlines()
    assert "patch adapters" not in without.args[0]
    small = plan(positive=positive, coarse_patches=sizes, **{**given, "card_memory": 1.04 * expected / 2**30}).args[0]
    assert "does not fit: lower its `batch_size` or the size of its pictures." in small, "5 % are added"


@pytest.mark.parametrize(("changes", "copies"), [({"optimizer": "Prodigy (prodigyopt)"}, 2), ({"ema": 0.99}, 1)])
def test_what_the_optimiser_and_an_average_keep_of_the_lora_is_counted(bench, plan, changes, copies):
    pytest.importorskip("prodigyopt")
    shown, before = (
        plan(checkpointing=False, **more).ui["blockskip_plan"][0]["as_set"]["phases"] for more in (changes, {})
    )
    lora = planned_lora_bytes(bench)
    assert lora > 0
    assert shown["training"] - before["training"] == copies * lora
    assert shown["precomputing"] == before["precomputing"]


def test_room_to_train_more_blocks_is_told_with_what_it_takes(bench, nodes, plan, tiny):
    model = tiny.tiny_flux(depth=2, depth_single=10)
    exact = {"back_residual": "exact", "quantize_frozen": "off"}

    def planned(selection, **changes):
        request = nodes.memory_plan.PlanRequest(**{**PLAN, **exact, **changes})
        return nodes.memory_plan.Plan(model, [bench.prompt], selection, request, lambda *_: None)

    half = bench.select(model=model, method="skip and freeze", skip_ratio=0.5)[0]
    more = bench.select(model=model, method="manual", front=1, back=3)[0]
    few, many = planned(half).needs.training, planned(more).needs.training
    result = plan(model=model, selection=half, **exact)
    hint = result.ui["blockskip_plan"][0]["hint"]
    assert "`method` manual, `front` 1, `back` 3 takes" in hint
    takes = f"takes {format_bytes(many.peak)} and {many.operations / few.operations:.2g} times the work"
    assert takes in hint
    assert hint in result.args[0].splitlines()
    packed = planned(more, quantize_kept="4-bit", quantize_frozen="4-bit").needs.training
    assert 1.1 * packed.peak < many.peak
    for peak, words in ((many.peak, "`back` 3 takes"), (packed.peak, "`quantize_frozen` 4-bit takes")):
        assert words in planned(half, card_memory=1.06 * peak / GIB).hint
        assert words not in planned(half, card_memory=1.04 * peak / GIB).hint
    assert not planned(more).hint, "chosen by hand"
    assert not planned(half, back_residual="constant").hint, "its last blocks would be skipped"
    assert not planned(half, card_memory=1e-6).hint, "nothing fits"
    quarter = bench.select(model=model, method="skip and freeze", skip_ratio=0.25)[0]
    assert not planned(quarter).hint, "it trains as many"


def planned_lora_bytes(bench):
    """Bytes of the LoRA's parameters in float32, with the plan's default layers."""
    from blockskip_pack.blockskip_core.hosts.models.hosted_dit import HostedDit

    selection = bench.select()[0]
    layers = HostedDit(bench.model, [bench.prompt], (16, 4, 4)).lora_layers(selection, "attention and mlp")
    return sum(4 * PLAN["rank"] * (layer.in_features + layer.out_features) for layer in layers.values())


def test_a_card_that_is_too_small_is_told_what_to_change(plan):
    text, enough, *_ = plan(card_memory=0.0009, checkpointing=False, patch_min=64).args
    assert enough is False
    assert "this run uses" in text or "No change of settings makes it fit" in text


def test_the_node_shows_the_plan_as_set_and_as_run(plan, bench):
    ui = plan(card_memory=0.0009, checkpointing=False, patch_min=64, batch_size=2).ui
    shown = json.loads(json.dumps(ui["blockskip_plan"][0], allow_nan=False))
    assert shown["fits"] is False
    assert shown["skipped"] == ["choosing blocks"]  # the blocks were chosen by hand
    assert shown["as_set"]["peak"] == max(shown["as_set"]["phases"][name] for name in ("precomputing", "training"))
    assert shown["as_set"]["peak"] > shown["available"]
    if shown["as_run"]:
        assert shown["as_run"]["peak"] <= shown["available"]
        assert shown["changes"]
    else:
        assert shown["advice"].startswith("No change of settings")


ENDS, SPAN = {}, {"front": 1, "back": 2, "tail": 1}


@pytest.mark.parametrize(
    ("spans", "storage", "back_residual", "residual_format"),  # every pair of values
    [
        (ENDS, "disk", "constant", "exact"), (ENDS, "chunked", "linear", "int8"), (SPAN, "disk", "linear", "int8"),
        (SPAN, "chunked", "constant", "int8"), (SPAN, "chunked", "linear", "exact"), (ENDS, "disk", "constant", "int8"),
    ],
)  # fmt: skip
def test_the_bytes_on_disk_are_those_of_the_run(bench, nodes, residual_format, back_residual, storage, spans):
    settings = {"residual_format": residual_format, "back_residual": back_residual, "chunk_size": 4, "storage": storage}
    selection = bench.select(**spans)[0]
    residuals = bench.precompute(draws=6, patch_min=32, patch_max=48, selection=selection, **settings)[0]
    planned = planned_run(bench, nodes, residuals.selection, **settings)
    from blockskip_pack.blockskip_core.hosts.models.hosted_dit import HostedDit
    from blockskip_pack.blockskip_core.residuals.residual_set import residual_bytes

    dit = HostedDit(bench.model, residuals.captions, residuals.latents.shape[1:])
    stored = range(6 if storage == "disk" else 4)
    assert planned.count(planned.settings).disk == residual_bytes(dit, residuals, stored)


def test_saved_bytes_and_weights_are_those_of_the_run(bench, nodes):
    trained = bench.train(residuals=bench.precompute(patch_min=32, patch_max=48)[0]).ui["blockskip"][0]
    planned = planned_run(bench, nodes, bench.select()[0])
    counted = planned.count(planned.settings).training
    assert counted.saved == trained["saved_for_backward_bytes"]
    assert counted.weights >= trained["kept_weights_bytes"]


def test_layers_that_are_quantised_for_the_run_are_in_host_memory_and_one_of_them_is_unpacked(bench, nodes):
    from blockskip_pack.blockskip_core.accounting.weight_formats import stored_bytes
    from blockskip_pack.blockskip_core.hosts.models.quantised_blocks import QuantisedDit

    planned = planned_run(bench, nodes, bench.select()[0])
    off, int8 = (planned.count(replace(planned.settings, quantize_kept=form)) for form in ("off", "int8"))
    dit = planned.run.dit
    quantised = QuantisedDit(dit, {dit.blocks[index].name: "int8" for index in planned.run.selection.kept})
    layers = {
        f"{name}.{path}": layer.weight
        for name in quantised._formats
        for path, layer in quantised.module(name).named_modules()
        if f"{name}.{path}" in quantised.layer_errors
    }
    assert int8.host - off.host == sum(map(stored_bytes, layers.values())) > 0
    one = max(weight.numel() for weight in layers.values())
    unpacked = one * (4 + dit.dtype.itemsize)
    assert int8.training.peak - int8.training.weights == off.training.peak - off.training.weights + unpacked


def test_the_model_is_not_loaded_and_not_changed(bench, plan):
    import comfy.model_management

    comfy.model_management.unload_all_models()
    before = {name: tensor.clone() for name, tensor in bench.model.model.state_dict().items()}
    plan()
    assert not comfy.model_management.current_loaded_models
    after = bench.model.model.state_dict()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"card_memory": -1.0}, "card_memory must not be negative, got -1.0"),
        ({"card_memory": float("nan")}, "card_memory must not be negative, got nan"),
        ({"activation_budget": float("nan")}, "activation_budget must not be negative, got nan"),
        ({"rank": 0}, "rank must be at least 1, got 0"),
        ({"draws": 0}, "draws must be at least 1, got 0"),
        ({"storage": "cloud"}, "storage must be one of disk, chunked, on the fly, got 'cloud'"),
        ({"quantize_kept": "2-bit"}, "quantize_kept '2-bit' is not a format of this ComfyUI"),
        ({"targets": "all"}, "targets must be one of .*, got 'all'"),
        ({"coarse_patches": "3x"}, "coarse_patches must be one of off, 2x, 4x, 2x and 4x, got '3x'"),
        ({"coarse_patches": "4x", "patch_min": 48}, "width and height must be multiples of 64 px"),
    ],
    ids=str,
)
def test_settings_that_make_no_sense_are_refused(plan, changes, match):
    with pytest.raises(ValueError, match=match):
        plan(**changes)


def test_a_selection_of_another_model_is_refused(bench, plan, tiny):
    other = tiny.tiny_flux(depth=1, depth_single=2)
    selection = bench.select(model=other, front=1, back=1)[0]
    with pytest.raises(ValueError, match="The selection was made for 3 blocks of flux, this model has 6"):
        plan(selection=selection)


def test_settings_that_fit_are_handed_on_unchanged_but_for_what_is_left(plan):
    settings = plan(use_spare=False, quantize_kept="off", patch_min=48, storage="chunked").args[3]
    assert (settings.patch_min, settings.storage, settings.quantize_kept) == (48, "chunked", "off")
    assert settings.config.checkpointing
    generous = plan(use_spare=True).args[3]
    assert not generous.config.checkpointing  # there is room to keep everything


def test_settings_that_do_not_fit_are_handed_on_with_the_change_that_helps(plan, nodes):
    wasteful = {"checkpointing": False, "patch_min": 64, "batch_size": 4, "use_spare": False}
    needed = plan(**wasteful).args[0].split("Needs ")[1].split(" as set")[0]
    number, unit = needed.split()
    gib = float(number) * {"KiB": 2.0**-20, "MiB": 2.0**-10, "GiB": 1.0}[unit]
    text, enough, _, settings = plan(card_memory=gib * 0.9, **wasteful).args
    assert not enough
    assert "this run uses" in text
    assert settings.config.checkpointing or settings.config.batch_size == 1 or settings.patch_min < 64
    assert f"On the output `settings`: {settings.describe()}" in text


def test_a_preset_is_a_card_with_room_for_the_desktop(plan):
    text = plan(preset="8 GB", card_memory=99.0).args[0]
    assert "you have 6.50 GiB (a card with 8 GB): fits." in text
    assert "How long that takes on another card is not known." in text
    with pytest.raises(ValueError, match="preset must be off or one of 6 GB, 8 GB, 12 GB, 16 GB, 24 GB, got '7 GB'"):
        plan(preset="7 GB")


def test_the_plan_s_settings_rule_at_the_nodes_that_they_are_connected_to(bench, plan):
    settings = plan(storage="chunked", patch_min=32, batch_size=2, use_spare=False, checkpointing=False).args[3]
    residuals = bench.precompute(memory_settings=settings, patch_min=48, storage="on the fly")[0]
    assert (residuals.schedule.patches.patch_min, residuals.storage) == (32, "chunked")
    trained = bench.train(residuals=residuals, memory_settings=settings, batch_size=1, accumulation=2, steps=2)
    expected = bench.train(residuals=residuals, batch_size=2, accumulation=2, steps=2, checkpointing=False)
    assert all(torch.equal(trained[0][name], tensor) for name, tensor in expected[0].items())
    assert trained[1] == expected[1]


def test_latents_of_another_size_than_planned_are_refused_before_anything_is_computed(bench, plan):
    latents = Listed({"samples": bench.vae.encode(torch.rand(1, 64, 64, 3))} for _ in range(2))
    with pytest.raises(
        ValueError, match=r"as pictures of 64 px, and Memory Plan counted 32 px\. Set `patch_min` .* to 64"
    ):
        bench.precompute(images=latents, memory_settings=plan(patch_min=32).args[3])
    residuals = bench.precompute(images=latents, memory_settings=plan(patch_min=64).args[3])[0]
    assert residuals.schedule.patches.patch_min == 64


def test_residuals_that_the_plan_did_not_count_are_refused(bench, plan):
    settings = plan(patch_min=48).args[3]
    with pytest.raises(
        ValueError, match="Memory Plan counted crops of 48 px with storage disk, but the residuals have 32 px"
    ):
        bench.train(memory_settings=settings)


@pytest.mark.parametrize("node", ["precompute", "train"])
def test_memory_settings_from_elsewhere_are_refused(bench, node):
    with pytest.raises(ValueError, match="memory_settings must come from Memory Plan's output `settings`, got a str"):
        getattr(bench, node)(memory_settings="8 GB")


def test_an_exact_back_is_counted_with_its_blocks_and_in_their_format(bench, nodes):
    selection = bench.select()[0]
    training = {
        name: planned_run(bench, nodes, selection, **changes).needs.training
        for name, changes in {
            "constant": {"back_residual": "constant"},
            "exact": {"back_residual": "exact", "quantize_frozen": "off"},
            "4-bit": {"back_residual": "exact", "quantize_frozen": "4-bit"},
        }.items()
    }
    assert training["constant"].weights < training["4-bit"].weights < training["exact"].weights
    assert training["exact"].operations > training["constant"].operations
    needs = planned_run(bench, nodes, selection, back_residual="exact").needs
    assert needs.disk < planned_run(bench, nodes, selection, back_residual="constant").needs.disk


def test_the_trainer_takes_the_frozen_format_of_the_plan(bench, plan):
    settings = plan(back_residual="exact", quantize_frozen="int8").args[3]
    assert (settings.frozen, settings.quantize_frozen) == (1, "int8")
    residuals = bench.precompute(back_residual="exact", memory_settings=settings)[0]
    planned = bench.train(residuals=residuals, memory_settings=settings, quantize_frozen="off")
    assert planned[1] == bench.train(residuals=residuals, quantize_frozen="int8")[1]


@pytest.mark.parametrize("node", ["plan", "trainer"])
@pytest.mark.parametrize("back_residual", ["constant", "exact"])
def test_a_format_of_frozen_blocks_that_the_device_lacks_is_refused_by_its_name(
    bench, plan, core, monkeypatch, back_residual, node
):
    method = {"constant": "skip and freeze", "exact": "manual"}[back_residual]
    selection = bench.select(method=method)[0]
    residuals = bench.precompute(selection=selection, back_residual=back_residual)[0] if node == "trainer" else None
    blocks = core("hosts.models.quantised_blocks")
    monkeypatch.setattr(blocks, "formats_on", lambda device: ["off", "int8"])
    given = {"selection": selection, "back_residual": back_residual} if node == "plan" else {"residuals": residuals}
    refused = {"plan": plan, "trainer": bench.train}[node]
    with pytest.raises(
        ValueError, match=r"quantize_frozen '4-bit' does not work on this device \(.+\)\. Choose one of off"
    ):
        refused(**given, quantize_frozen="4-bit")

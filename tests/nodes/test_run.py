"""The four nodes on a tiny FLUX.1, connected to ComfyUI's own nodes, and how often work is repeated."""

from __future__ import annotations

import json
import math

import pytest
import torch
from safetensors import safe_open

STORAGES = ("disk", "chunked", "on the fly")
KEPT_LAYERS = 3 * 2  # front 2 and back 1 of 2 double and 4 single blocks leave 3 single ones with 2 layers each


def weights(model):
    return {name: tensor.clone() for name, tensor in model.model.state_dict().items()}


def patched_weights(patched):
    """Return a MODEL's weights during sampling."""
    import comfy.lora

    plain = patched.model.state_dict()
    return {
        key: comfy.lora.calculate_weight(patches, plain[key].clone(), key) for key, patches in patched.patches.items()
    }


def assert_same_weights(one, other):
    assert one
    assert set(one) == set(other)
    for key in one:
        torch.testing.assert_close(
            one[key], other[key], rtol=1e-5, atol=1e-7, msg=lambda text, key=key: f"{key}: {text}"
        )


BEFORE_AND_AFTER = {"double_blocks.1", "single_blocks.0", "single_blocks.3"}


def assert_picture(image):
    assert image.ndim == 4
    assert image.shape[0] == 1
    assert image.shape[-1] == 3
    assert image.min() >= 0.0
    assert image.max() <= 1.0
    assert image.std() > 0.0  # not blank


@pytest.mark.parametrize("storage", STORAGES)
def test_the_four_nodes_in_a_row(bench, storage):
    before = weights(bench.model)

    selection, heatmap, report = bench.select().args
    assert "first 2 and the last 1 of 6" in report
    assert_picture(heatmap)

    residuals, patches = bench.precompute(selection=selection, storage=storage, chunk_size=4).args
    assert_picture(patches)
    stored = bool(list(bench.folders.output.glob("blockskip/residuals/*/manifest.json")))
    assert stored == (storage == "disk")

    trained = bench.train(residuals=residuals, batch_size=2, accumulation=2, output_name="loras/toy")
    lora, loss_map, steps = trained.args
    assert steps == 3
    assert len(loss_map["loss"]) == 6
    assert all(math.isfinite(loss) for loss in loss_map["loss"])
    assert len(lora) == 3 * KEPT_LAYERS  # up, down, alpha
    assert not any(tensor.is_inference() or tensor.requires_grad for tensor in lora.values())

    patched, info = bench.apply(lora=lora).args
    assert f"{KEPT_LAYERS} layers patched" in info
    assert "skipped first: 2" in info
    assert patched.patches
    assert not bench.model.patches

    after = weights(bench.model)
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert "loras/toy_00001_.safetensors" in [name.removeprefix("output/") for name in bench.folders.files()]
    if storage == "chunked":
        assert not list(bench.folders.output.glob("blockskip/residuals/*/*"))


@pytest.mark.parametrize("storage", ["disk", "chunked"])
def test_a_linear_back_residual_starts_from_the_full_model_and_then_learns_otherwise(bench, storage):
    losses = {}
    for kind in ("constant", "linear"):
        residuals = bench.precompute(storage=storage, back_residual=kind, chunk_size=4)[0]
        trained = bench.train(residuals=residuals, output_name=f"loras/{kind}")
        assert trained.ui["blockskip"][0]["self_check"] < 1e-4
        assert bench.apply(lora=trained[0]).args[1].count(f"back residual: {kind}") == 1
        losses[kind] = trained[1]["loss"]
    assert losses["linear"][0] == pytest.approx(losses["constant"][0], rel=1e-4)
    assert losses["linear"][1:] != losses["constant"][1:]


@pytest.mark.parametrize("storage", ["disk", "chunked", "on the fly"])
def test_with_an_exact_back_the_last_blocks_run_without_adapters(bench, storage):
    before = weights(bench.model)
    residuals = bench.precompute(storage=storage, back_residual="exact")[0]
    trained = bench.train(residuals=residuals, output_name="loras/exact", quantize_frozen="off")
    (figures,) = trained.ui["blockskip"]
    assert (figures["skipped_first"], figures["skipped_last"], figures["frozen_last"]) == (2, 0, 1)
    assert {name.split(".")[2] for name in trained[0] if "single_blocks" in name} == {"0", "1", "2"}
    assert figures["kept_blocks"] == 4
    if storage != "on the fly":
        assert figures["self_check"] < 1e-6, "nothing is approximated"
    assert "frozen last: 1" in bench.apply(lora=trained[0]).args[1]
    after = weights(bench.model)
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize(
    ("storage", "back_residual"),
    [("disk", "linear"), ("disk", "exact"), ("chunked", "constant"), ("chunked", "linear"), ("on the fly", "constant"),
     ("on the fly", "exact")],
)  # fmt: skip
def test_a_span_in_front_of_last_blocks_that_are_trained(bench, storage, back_residual):
    selection, heatmap, report = bench.select(front=1, back=2, tail=1).args
    assert "Skip the first 1 and 2 in front of the last 1 of 6 blocks (50%); train 3." in report
    assert_picture(heatmap)
    settings = {"storage": storage, "back_residual": back_residual, "chunk_size": 4}
    residuals = bench.precompute(selection=selection, **settings)[0]
    trained = bench.train(residuals=residuals, quantize_frozen="off")
    figures = trained.ui["blockskip"][0]
    assert (figures["skipped_first"], figures["kept_last"]) == (1, 1)
    assert (figures["skipped_last"], figures["frozen_last"]) == ((0, 2) if back_residual == "exact" else (2, 0))
    assert {".".join(name.split(".")[1:3]) for name in trained[0]} == BEFORE_AND_AFTER
    assert storage == "on the fly" or figures["self_check"] < 1e-4
    assert "kept last: 1" in bench.apply(lora=trained[0]).args[1]


@pytest.mark.parametrize("back_residual", ["constant", "exact"])
def test_skip_and_freeze_leaves_nothing_to_be_approximated(bench, back_residual):
    selection, heatmap, report = bench.select(method="skip and freeze", skip_ratio=0.4).args
    assert "Skip the first 1 of 6 blocks (17%); train 3.\nThe last 2 also run in training, without adapters." in report
    assert_picture(heatmap)
    residuals = bench.precompute(selection=selection, back_residual=back_residual)[0]
    trained = bench.train(residuals=residuals, quantize_frozen="off")
    figures = trained.ui["blockskip"][0]
    assert (figures["skipped_first"], figures["skipped_last"], figures["frozen_last"]) == (1, 0, 2)
    assert figures["self_check"] < 1e-6


def test_cost_and_influence_reads_what_was_measured_and_samples_nothing(bench, nodes, monkeypatch):
    probe = {"probe_size": 32, "probe_steps": 1, "window_profile": False}
    first, _, report = bench.select(method="cost and influence", skip_ratio=0.4, **probe).args
    assert (first.front, first.back) == (2, 0)
    assert "No measurement is stored for this model and these probe settings, so front first." in report
    bench.select(method="attention mask", skip_ratio=0.6, **probe)
    monkeypatch.setattr(nodes.select_blocks, "text_influence", None)
    chosen, heatmap, report = bench.select(method="cost and influence", skip_ratio=0.4, **probe).args
    assert "Predicted loss of influence" in report
    assert chosen.skipped_bytes >= 0.4 * sum(chosen.block_bytes)
    assert chosen.tail in ((1, 2, 3) if chosen.back else (0,))
    assert_picture(heatmap)


def test_the_residuals_of_an_exact_back_are_those_of_its_front(bench):
    exact = bench.precompute(back_residual="exact")[0]
    front = bench.precompute(selection=bench.select(front=2, back=0)[0])[0]
    constant = bench.precompute()[0]
    assert exact.folder == front.folder != constant.folder
    own, others = (bench.train(residuals=some)[1]["loss"] for some in (exact, constant))
    assert own[0] == pytest.approx(others[0], rel=0.2), "the same model before anything is learned, but for 4 bits"


@pytest.mark.parametrize("form", ["int8", "4-bit"])
def test_frozen_blocks_are_quantised_by_themselves(bench, form):
    residuals = bench.precompute(back_residual="exact")[0]
    exact = bench.train(residuals=residuals, quantize_frozen="off")
    trained = bench.train(residuals=residuals, quantize_frozen=form)
    kept = [run.ui["blockskip"][0]["kept_weights_bytes"] for run in (exact, trained)]
    assert kept[1] < kept[0]
    assert 0 < trained.ui["blockskip"][0]["self_check"] < 0.2
    assert trained[1]["loss"] != exact[1]["loss"]
    assert trained[1]["loss"] == pytest.approx(exact[1]["loss"], rel=0.2)


@pytest.mark.parametrize("form", ["int8", "fp8"])
def test_residuals_in_eight_bits_take_less_room_and_train_nearly_the_same(bench, form):
    exact, small = (bench.precompute(residual_format=which)[0] for which in ("exact", form))
    sizes = [sum(file.stat().st_size for file in some.folder.glob("*.safetensors")) for some in (exact, small)]
    assert sizes[1] < 0.5 * sizes[0]  # from float32; the latents are stored unchanged
    expected, trained = (bench.train(residuals=some) for some in (exact, small))
    assert trained[1]["loss"] == pytest.approx(expected[1]["loss"], rel=0.05)
    assert f"residual format: {form}" in bench.apply(lora=trained[0]).args[1]


@pytest.mark.parametrize("settings", [{"activation_budget": 0.25}, {"kept_weights": "streamed"}], ids=str)
def test_ways_to_spend_or_save_memory_change_nothing_of_the_result(bench, settings):
    residuals = bench.precompute()[0]
    expected, trained = bench.train(residuals=residuals), bench.train(residuals=residuals, **settings)
    assert trained[1] == expected[1]
    assert all(torch.equal(trained[0][name], tensor) for name, tensor in expected[0].items())


def test_equal_crops_of_several_shapes_are_encoded_once_and_stored(bench):
    residuals, _ = bench.precompute(draws=9, patch_order="fixed", patch_shape="as pictures")
    first = {}
    for draw, latent in zip(residuals.schedule, residuals.latents, strict=True):
        assert torch.equal(latent, first.setdefault((draw.picture, draw.top, draw.left), latent))
    assert bench.vae.encoded == len(first) < 9


@pytest.mark.parametrize("back_residual", ["constant", "linear"])
def test_the_chunk_size_does_not_change_what_is_stored(bench, back_residual):
    asked = {"back_residual": back_residual}
    assert len({bench.precompute(chunk_size=size, **asked)[0].folder for size in (2, 4)}) == 1


def test_a_linear_answer_without_last_blocks_to_skip_is_a_constant(bench):
    front = bench.select(front=2, back=0)[0]
    assert (
        len({bench.precompute(selection=front, back_residual=kind)[0].folder for kind in ("constant", "linear")}) == 1
    )


@pytest.mark.parametrize("file_format", ["diffusers", "peft", "kohya"])
def test_the_saved_file_is_the_lora_and_says_what_it_is(bench, file_format):
    lora = bench.train(rank=4, alpha=8.0, output_name="loras/toy", file_format=file_format)[0]
    with safe_open(bench.folders.loras / "toy_00001_.safetensors", framework="pt") as file:
        said = json.loads(file.metadata()["blockskip"])
    assert (said["base_model"], said["steps"], said["rank"], said["alpha"]) == ("FLUX.1", 3, 4, 8.0)
    assert (said["skipped_first"], said["skipped_last"], said["blocks"]) == (2, 1, 6)

    from_wire = bench.apply(lora=lora, strength_model=0.7)
    from_file = bench.apply(lora_name="toy_00001_.safetensors", strength_model=0.7)
    assert_same_weights(patched_weights(from_wire[0]), patched_weights(from_file[0]))
    assert "steps: 3" in from_file[1]
    plain = bench.model.model.state_dict()
    assert all(not torch.equal(changed, plain[key]) for key, changed in patched_weights(from_file[0]).items())


def test_a_file_of_flux_has_diffusers_names_unless_it_is_asked_otherwise(bench, tiny):
    """Like the published model, this one has an MLP of four times its width, which diffusers' names assume."""
    model = tiny.tiny_flux(mlp_ratio=4.0)
    residuals = bench.precompute(model=model)[0]
    for options, prefix, loads in [
        ({}, "transformer.single_transformer_blocks.0.proj_mlp.lora_A.weight", "ComfyUI, diffusers"),
        ({"file_format": "peft"}, "diffusion_model.single_blocks.0.linear1.lora_A.weight", "ComfyUI"),
        ({"file_format": "kohya"}, "lora_unet_single_blocks_0_linear1.alpha", "ComfyUI, diffusers"),
    ]:
        trained = bench.train(model=model, residuals=residuals, steps=1, **options)
        file = trained.ui["blockskip"][0]["file"]
        applied = bench.apply(model=model, lora_name=file)
        assert f"loads in: {loads}\n" in applied[1]
        from_wire = patched_weights(bench.apply(model=model, lora=trained[0])[0])
        for name, tensor in patched_weights(applied[0]).items():
            torch.testing.assert_close(tensor, from_wire[name], atol=1e-6, rtol=1e-5)
        with safe_open(bench.folders.loras / file, framework="pt") as opened:
            assert prefix in opened.keys()


def test_a_lora_that_is_on_the_model_while_it_is_trained_is_not_in_the_file(bench):
    """A training adapter: in force during training, and no part of what is saved, on whichever layers it is."""
    from safetensors.torch import save_file

    import nodes as host_nodes

    adapter, generator = {}, torch.Generator().manual_seed(3)
    for name, layer in bench.model.model.diffusion_model.named_modules():
        if "_blocks." in name and hasattr(layer, "in_features"):
            for factor, shape in (("A", (2, layer.in_features)), ("B", (layer.out_features, 2))):
                adapter[f"diffusion_model.{name}.lora_{factor}.weight"] = 0.3 * torch.randn(shape, generator=generator)
    save_file(adapter, bench.folders.loras / "training_adapter.safetensors")
    (with_adapter,) = host_nodes.LoraLoaderModelOnly().load_lora_model_only(
        bench.model, "training_adapter.safetensors", 1.0
    )
    losses = []
    for model in (bench.model, with_adapter):
        residuals = bench.precompute(model=model)[0]
        trained = bench.train(model=model, residuals=residuals, learning_rate=1e-6)  # so that nothing is learned
        losses.append(trained[1]["loss"][0])
        assert trained.ui["blockskip"][0]["self_check"] < 1e-4
        file = bench.folders.loras / trained.ui["blockskip"][0]["file"]
        saved = patched_weights(bench.apply(lora_name=file.name)[0])
        assert len(saved) == KEPT_LAYERS
        plain = bench.model.model.state_dict()
        for name, tensor in saved.items():
            torch.testing.assert_close(tensor, plain[name], atol=1e-4, rtol=0.0, msg=name)
    assert losses[0] != pytest.approx(losses[1], rel=1e-2)


def test_other_programs_find_the_base_model_in_the_file(bench):
    file = bench.train(output_name="loras/toy").ui["blockskip"][0]["file"]
    with safe_open(bench.folders.loras / file, framework="pt") as opened:
        strings = opened.metadata()
    assert strings["modelspec.architecture"] == "flux-1-schnell/lora"
    assert strings["modelspec.title"] == strings["ss_output_name"] == "toy_00001"
    assert (strings["ss_base_model_version"], strings["ss_network_dim"], strings["ss_steps"]) == ("flux1", "4", "3")


def test_a_rank_that_no_layer_can_use_is_capped_and_said(bench):
    """The layers have width 64. A higher rank would only make the first values larger."""
    trained = bench.train(rank=512, learning_rate=1e-3)
    ranks = {len(tensor) for name, tensor in trained[0].items() if name.endswith("lora_down.weight")}
    assert ranks == {64}
    (problem,) = trained.ui["blockskip"][0]["problems"]
    assert problem.startswith(
        "rank 512 is more than 6 of 6 layers can use: their rank is their smaller side, at least 64"
    )
    losses = trained[1]["loss"]
    assert max(losses) < 2 * losses[0]


def test_cores_own_nodes_take_the_outputs(bench, run_node):
    from comfy_extras.nodes_train import LoraModelLoader, LossGraphNode, SaveLoRA

    lora, loss_map, steps = bench.train(output_name="loras/ours").args
    ours = patched_weights(bench.apply(lora=lora)[0])

    loaded = run_node(LoraModelLoader, model=bench.model, lora=lora, strength_model=1.0)[0]
    assert_same_weights(ours, patched_weights(loaded))

    run_node(SaveLoRA, lora=lora, prefix="loras/cores", steps=steps)
    assert (bench.folders.loras / "cores_3_steps_00001_.safetensors").is_file()
    again = bench.apply(lora_name="cores_3_steps_00001_.safetensors")
    assert_same_weights(ours, patched_weights(again[0]))
    assert "The file has no metadata" in again[1]

    run_node(LossGraphNode, loss=loss_map, filename_prefix="loss")
    assert [path for path in bench.folders.temp.rglob("*.png") if path.stat().st_size]


def test_the_run_tells_figures_that_a_browser_can_read(bench):
    (summary,) = bench.train(output_name="loras/toy").ui["blockskip"]
    assert json.loads(json.dumps(summary, allow_nan=False)) == summary
    assert summary["file"] == "toy_00001_.safetensors"
    assert (summary["kept_blocks"], summary["blocks"]) == (3, 6)
    assert 0 < summary["kept_weights_bytes"] < summary["all_weights_bytes"]
    assert summary["self_check"] <= 1e-4


@pytest.mark.parametrize(
    ("weight_format", "storage"),
    [("fp8", "disk"), ("int8", "chunked"), ("4-bit", "on the fly"), ("4-bit", "disk")],
)
def test_kept_blocks_can_be_quantised_for_a_run(bench, core, weight_format, storage):
    before = weights(bench.model)
    residuals = bench.precompute(storage=storage, chunk_size=4)[0]
    plain = bench.train(residuals=residuals, output_name="loras/plain").ui["blockskip"][0]
    trained = bench.train(residuals=residuals, quantize_kept=weight_format, output_name="loras/quantised")
    said = trained.ui["blockskip"][0]
    blocks = bench.model.model.diffusion_model.single_blocks[:3]
    predicted = core("accounting.weight_formats").predicted_bytes
    assert said["quantize_kept"] == weight_format
    assert said["kept_weights_bytes"] == sum(predicted(block, weight_format) for block in blocks)
    assert said["kept_weights_bytes"] < 0.3 * plain["kept_weights_bytes"]  # of float32
    assert said["all_weights_bytes"] == plain["all_weights_bytes"]
    assert said["saved_for_backward_bytes"] == plain["saved_for_backward_bytes"]
    assert 1e-4 < said["self_check"] < 0.2
    assert (plain["self_check"] is None) if storage == "on the fly" else (plain["self_check"] < 1e-4)
    assert said["loss_of_first_tenth"] == pytest.approx(plain["loss_of_first_tenth"], rel=0.1)

    patched, info = bench.apply(lora=trained[0]).args
    assert f"{KEPT_LAYERS} layers patched" in info
    after = weights(bench.model)
    assert all(torch.equal(before[name], after[name]) for name in before)
    with safe_open(bench.folders.loras / "quantised_00001_.safetensors", framework="pt") as file:
        told = json.loads(file.metadata()["blockskip"])
    assert told["quantize_kept"] == weight_format
    assert ("correct_4bit" in told) is (weight_format == "4-bit")


def test_a_lora_never_overwrites_another(bench):
    residuals = bench.precompute()[0]
    for _ in range(2):
        bench.train(residuals=residuals, steps=1, output_name="loras/toy")
    assert sorted(path.name for path in bench.folders.loras.iterdir()) == [
        "toy_00001_.html",
        "toy_00001_.safetensors",
        "toy_00002_.html",
        "toy_00002_.safetensors",
    ]


def test_the_same_seed_trains_the_same_lora(bench):
    residuals = bench.precompute()[0]
    first, second, other = (bench.train(residuals=residuals, seed=seed)[0] for seed in (5, 5, 6))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not all(torch.equal(first[name], other[name]) for name in first)


def test_precomputing_twice_encodes_and_writes_once(bench):
    bench.precompute()
    manifest = next(bench.folders.output.glob("blockskip/residuals/*/manifest.json"))
    written, encoded = manifest.stat().st_mtime_ns, bench.vae.encoded
    bench.precompute()
    assert (manifest.stat().st_mtime_ns, bench.vae.encoded) == (written, encoded)
    bench.precompute(seed=4)
    assert bench.vae.encoded > encoded, "another seed takes other crops"
    assert len(list(bench.folders.output.glob("blockskip/residuals/*"))) == 2


def test_residuals_that_vanished_are_computed_again_by_the_trainer(bench):
    import shutil

    residuals = bench.precompute()[0]
    shutil.rmtree(bench.folders.output / "blockskip")
    assert bench.train(residuals=residuals)[2] == 3


def test_more_steps_than_draws_start_over(bench):
    residuals = bench.precompute(draws=2)[0]
    losses = bench.train(residuals=residuals, steps=5, learning_rate=1e-6)[1]["loss"]
    torch.testing.assert_close(losses[0], losses[2], rtol=1e-3, atol=0.0)
    assert abs(losses[0] - losses[1]) > 1e-3 * losses[0]


def test_strength_zero_gives_the_plain_model(bench):
    lora = bench.train()[0]
    assert bench.apply(lora=lora, strength_model=0.0)[0] is bench.model


def test_measuring_remembers_what_it_measured(bench, core, monkeypatch):
    sampled = []
    sampler = core("hosts.sampling.probe_pictures").MaskedSampler
    sample = sampler.sample

    def counting(self, *args, masked, **kwargs):
        sampled.append(masked)
        return sample(self, *args, masked=masked, **kwargs)

    monkeypatch.setattr(sampler, "sample", counting)
    settings = {"method": "attention mask", "probe_size": 32, "probe_steps": 1, "window_profile": False}
    selection, heatmap, report = bench.select(skip_ratio=0.5, **settings).args
    assert (selection.front + selection.back, selection.num_blocks) == (3, 6)
    assert len(sampled) == 1 + 3 + 3  # the plain picture, and the first and the last 1, 2, 3 blocks masked
    assert "Connect `vae` and `clip_vision`" in report
    assert_picture(heatmap)

    again = bench.select(skip_ratio=0.3, **settings)  # 2 of 6: everything needed has been measured
    assert len(sampled) == 7
    assert again[0].front + again[0].back == 2
    bench.select(skip_ratio=0.5, **settings, seed=1)
    assert len(sampled) == 14


def test_the_preset_measures_nothing_and_says_that_it_is_scaled(bench):
    selection, _, report = bench.select(method="preset", skip_ratio=0.5).args
    assert (selection.front, selection.back) == (2, 1)
    assert "Scaled from the paper's indices" in report
    assert not bench.folders.files()


def test_a_caption_for_each_picture_goes_with_its_picture(bench, tiny):
    captions = type(bench.pictures)(tiny.captions((5, 3, 7)))  # a list, as from CLIP Text Encode for a dataset
    residuals = bench.precompute(positive=captions)[0]
    assert [draw.caption for draw in residuals.schedule] == [draw.picture for draw in residuals.schedule]
    assert bench.train(residuals=residuals, batch_size=2)[2] == 3


def test_texts_that_were_combined_are_one_prompt_and_no_captions(bench, tiny):
    combined = [
        entry for caption in tiny.captions((5, 3, 7)) for entry in caption
    ]  # as Conditioning (Combine) gives it
    with pytest.raises(ValueError, match="Conditioning 1 combines 3 texts, and training takes one text at a time"):
        bench.precompute(positive=combined)


def test_one_batch_of_pictures_does_as_well_as_a_list(bench):
    batch = torch.rand(3, 64, 64, 3, generator=torch.Generator().manual_seed(2))
    whole = bench.precompute(images=batch)[0]
    apart = bench.precompute(images=type(bench.pictures)(batch.split(1)))[0]
    assert whole.identity == apart.identity

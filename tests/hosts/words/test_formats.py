"""Weights in the formats in common use: which perturbation the loss follows, and what is refused."""

import pytest
import torch
from blockskip_pack.blockskip_core.errors import TrainingError
from blockskip_pack.blockskip_core.zoodip.examples import ExampleSchedule
from blockskip_pack.blockskip_core.zoodip.settings import WordSettings
from blockskip_pack.blockskip_core.zoodip.signal import measure_signal
from blockskip_pack.blockskip_core.zoodip.training import WordResult, WordTraining
from blockskip_pack.blockskip_core.zoodip.word import WordLayout

from .. import gguf_files
from ..stored_flux import LATENT_SHAPE, stored_flux
from ..tiny_families import WIDE

pytestmark = pytest.mark.usefixtures("comfyui")
PAIRS = 12
STEPS = 6


@pytest.fixture
def clip(clip_of, monkeypatch):
    """A CLIP of FLUX.1 whose T5 fills up no caption: int8 in plain torch takes its time for each token."""
    made = clip_of("FLUX.1")
    monkeypatch.setattr(made.tokenizer.t5xxl, "min_length", 1)
    return made


def losses_of(clip, model):
    """The losses of a word, its layout and first value."""
    from blockskip_pack.blockskip_core.hosts.words.captions import WordCaptions
    from blockskip_pack.blockskip_core.hosts.words.encoders import known_word
    from blockskip_pack.blockskip_core.hosts.words.losses import WordLosses

    parts, vectors = known_word(clip, "dog")
    layout = WordLayout(parts)
    captions = WordCaptions(clip, ["a photo of {word}"], parts)
    latents = torch.randn(2, *LATENT_SHAPE, generator=torch.Generator().manual_seed(3))
    return WordLosses(model, captions, layout, latents, 2), layout, layout.join(vectors)


@torch.no_grad()
def measured(clip, model, perturbation=0.2):
    losses, layout, first = losses_of(clip, model)
    examples = ExampleSchedule(0, 2, lowest=0.0, highest=1.0).spread(PAIRS)
    with losses.loaded(6):
        return measure_signal(losses, first, layout.sizes, perturbation, examples, seed=0)


@pytest.mark.parametrize("name", ["fp32", "bf16", "fp8 scaled", "int8", "nvfp4"])
def test_a_format_with_signal_is_used_as_loaded(clip, tmp_path, name):
    signal = measured(clip, stored_flux(tmp_path, name))
    assert signal.perturbation == 0.2
    assert signal.agreement[0.2] > 0.9


def test_four_bit_weights_with_four_bit_inputs_are_refused(clip, tmp_path):
    with pytest.raises(TrainingError, match="with 4-bit weights and 4-bit inputs it moves in jumps"):
        measured(clip, stored_flux(tmp_path, "convrot w4a4"))


def test_int8_needs_a_larger_perturbation_and_gets_it(clip_of, tmp_path):
    """Its inputs are rounded too, so small changes of the word are lost."""
    model = stored_flux(tmp_path, "int8")
    signal = measured(clip_of("FLUX.1"), model, perturbation=0.02)
    assert max(signal.agreement.values()) < 0.9
    assert signal.agreement[signal.perturbation] == max(signal.agreement.values())


@pytest.mark.parametrize("name", ["int8 convrot", "GGUF"])
@torch.no_grad()
def test_a_word_is_learned_from_packed_weights(clip, tmp_path, name):
    """A few steps lower the loss of two fixed examples."""
    flux = WIDE[0]
    model = gguf_files.stored(flux, tmp_path / "model.gguf") if name == "GGUF" else stored_flux(tmp_path, name)
    losses, layout, first = losses_of(clip, model)
    settings = WordSettings(steps=STEPS, directions=4, pool=2)
    examples = ExampleSchedule(0, 2, lowest=0.3, highest=1.0, pool=settings.pool)
    training = WordTraining(losses, layout, first, examples, settings, result=WordResult())
    with losses.loaded(settings.passes_per_step):
        training.run()
        before, after = (
            torch.cat([losses(word[None], examples[step]) for step in range(2)]).mean()
            for word in (first, training.word)
        )
    assert after < before

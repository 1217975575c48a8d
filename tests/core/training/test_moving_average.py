"""The moving average of a LoRA: its closed form, and that a run shows and saves it while it trains its own values."""

import math

import pytest
import torch
from blockskip_pack.blockskip_core.errors import CheckpointError, InvalidInputError
from blockskip_pack.blockskip_core.training.config import TrainingConfig
from blockskip_pack.blockskip_core.training.loop import train_lora
from blockskip_pack.blockskip_core.training.moving_average import MovingAverage, decay_at
from blockskip_pack.blockskip_core.training.observer import TrainingObserver
from blockskip_pack.blockskip_core.training.result import TrainingResult
from safetensors.torch import load_file

from ..plain_dit import MemorySource, PlainDit, latents, lora_for, schedule, selection
from .test_checkpoints import STEPS, assert_same, store, train

DECAY = 0.3  # reached at step 3: (1 + 3) / (10 + 3) = 0.307...


class Seen(TrainingObserver):
    """Keeps what every step shows of the LoRA, and what it shows between steps."""

    def __init__(self, adapters):
        self.adapters, self.shown, self.between = adapters, [], {}

    def on_step(self, report):
        self.shown.append(self.adapters.state_dict())

    def is_due(self, step):
        return step in (0, 2, 4)

    def between_steps(self, step):
        self.between[step] = self.adapters.state_dict()


def trained(ema, **settings):
    """Train in float64 and return (initial values, what was seen, final values)."""
    dit, plan, chosen, clean = PlainDit(), schedule(), selection(1, 1), latents()
    adapters = lora_for(dit, chosen)
    first, seen = adapters.state_dict(), Seen(adapters)
    config = TrainingConfig(**{"steps": 5, "learning_rate": 1e-2, "ema": ema, **settings})
    train_lora(
        dit, plan, clean, chosen, MemorySource(dit, chosen, plan, clean), adapters, config, result=TrainingResult(),
        observers=[seen],
    )  # fmt: skip
    return first, seen, adapters.state_dict()


def closed_form(first, values, decay):
    """The average of x_0 ... x_N as one weighted sum: x_n weighs (1 - d_n) times the product of all later decays."""
    decays = [0.0, *(min(decay, (1 + n) / (10 + n)) for n in range(1, len(values) + 1))]
    weights = [(1 - decays[n]) * math.prod(decays[n + 1 :]) for n in range(len(decays))]
    assert sum(weights) == pytest.approx(1.0, abs=1e-15)
    return {name: sum(w * x[name] for w, x in zip(weights, [first, *values], strict=True)) for name in first}


@pytest.mark.parametrize("settings", [{}, {"accumulation": 2}, {"batch_size": 2, "checkpointing": False}], ids=str)
@pytest.mark.parametrize("decay", [DECAY, 0.999])
def test_a_run_shows_and_ends_with_the_closed_form_of_its_raw_values(decay, settings):
    first, raw, _ = trained(0.0, **settings)
    again, averaged, final = trained(decay, **settings)
    assert_same(first, again)
    for step in range(1, 6):
        expected = closed_form(first, raw.shown[:step], decay)
        for name, tensor in averaged.shown[step - 1].items():
            torch.testing.assert_close(tensor, expected[name], atol=1e-14, rtol=1e-12)
    assert_same(final, averaged.shown[-1])
    assert not torch.equal(next(iter(final.values())), next(iter(raw.shown[-1].values())))


def test_samples_are_made_with_the_average():
    first, averaged, _ = trained(DECAY)
    assert averaged.between.keys() == {0, 2, 4}
    assert_same(averaged.between[0], first)
    assert_same(averaged.between[2], averaged.shown[1])
    assert_same(averaged.between[4], averaged.shown[3])


def test_the_decay_warms_up_to_its_value():
    assert [decay_at(step, 0.5) for step in (1, 2, 8, 9)] == [2 / 11, 3 / 12, 0.5, 0.5]
    assert decay_at(10**6, 0.999) == 0.999


@pytest.mark.parametrize(
    "settings", [{}, {"lr_schedule": "cosine", "accumulation": 3}, {"storage": "chunked"}], ids=str
)
@pytest.mark.parametrize("cut_after", [1, 4, 6])
def test_a_run_that_was_cut_off_ends_with_the_same_average(tmp_path, cut_after, settings):
    expected, whole = train(tmp_path / "whole", ema=0.9, **settings)
    cut, _ = train(tmp_path / "cut", store(tmp_path), cut_after=cut_after, ema=0.9, **settings)
    got, result = train(tmp_path / "cut", store(tmp_path), ema=0.9, **settings)
    assert_same(got, expected)
    assert result.losses == whole.losses  # those of the raw values
    assert result.resumed_at == cut_after
    assert not torch.equal(next(iter(cut.values())), next(iter(got.values())))


def test_a_state_has_both_and_a_run_that_was_cut_off_ends_with_the_average(tmp_path):
    raw, _ = train(tmp_path / "raw", cut_after=3)
    cut, _ = train(tmp_path / "cut", store(tmp_path), cut_after=3, ema=0.9)
    state = load_file(tmp_path / "run" / "state-00000003.safetensors")
    assert_same({name: state[name] for name in raw}, raw)
    assert_same({name.removeprefix("average/"): x for name, x in state.items() if name.startswith("average/")}, cut)


def test_a_finished_run_goes_on_from_its_raw_values(tmp_path):
    train(tmp_path / "a", store(tmp_path), steps=4, ema=0.9)
    assert_same(train(tmp_path / "a", store(tmp_path), ema=0.9)[0], train(tmp_path / "whole", ema=0.9)[0])
    nothing_left, result = train(tmp_path / "a", store(tmp_path), ema=0.9)
    assert result.resumed_at == STEPS
    assert_same(nothing_left, train(tmp_path / "whole", ema=0.9)[0])


def test_without_it_states_are_those_of_before(tmp_path):
    train(tmp_path / "a", store(tmp_path), ema=0.0)
    state = load_file(tmp_path / "run" / f"state-{STEPS:08d}.safetensors")
    assert not [name for name in state if name.startswith("average/")]
    assert {"ema"} <= TrainingConfig(steps=1).without_effect
    assert "ema" not in TrainingConfig(steps=1, ema=0.5).without_effect


@pytest.mark.parametrize(("first", "then"), [(0.0, 0.9), (0.9, 0.0)])
def test_a_state_without_the_average_that_a_run_needs_is_refused(tmp_path, first, then):
    """Their identities differ, so this takes a state that was put there by hand."""
    train(tmp_path / "a", store(tmp_path), steps=3, ema=first)
    with pytest.raises(CheckpointError, match="Turn resume off"):
        train(tmp_path / "a", store(tmp_path), ema=then)


@pytest.mark.parametrize("ema", [-0.1, 1.0, float("nan")])
def test_a_decay_out_of_range_is_refused(ema):
    with pytest.raises(InvalidInputError, match="ema must be at least 0 and below 1"):
        TrainingConfig(steps=1, ema=ema)


def test_values_come_back_however_showing_ends():
    parameter = torch.nn.Parameter(torch.zeros(3))
    average = MovingAverage([parameter], 0.5)
    parameter.data += 1.0
    average.update(100)

    def interrupted():
        with average.shown():
            assert parameter.tolist() == [0.5] * 3
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert parameter.tolist() == [1.0] * 3
    average.keep()
    assert parameter.tolist() == [0.5] * 3


def test_without_a_decay_nothing_is_stored_or_exchanged():
    parameter = torch.nn.Parameter(torch.ones(3))
    average, place = MovingAverage([parameter], 0.0), parameter.data_ptr()
    average.update(1)
    with average.shown():
        assert parameter.data_ptr() == place
    average.keep()
    assert parameter.data_ptr() == place

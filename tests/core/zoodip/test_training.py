"""The loop: it learns, counts its passes, and resumes bit for bit."""

import dataclasses

import pytest
import torch
from blockskip_pack.blockskip_core.errors import InvalidInputError, StorageError, TrainingError
from blockskip_pack.blockskip_core.training.checkpoints import Checkpoints, RunIdentity
from blockskip_pack.blockskip_core.training.observer import OnStep
from blockskip_pack.blockskip_core.zoodip.examples import ExampleSchedule
from blockskip_pack.blockskip_core.zoodip.settings import CLIP_L_SIZE, WordSettings, paper_settings
from blockskip_pack.blockskip_core.zoodip.training import WordResult, WordTraining
from blockskip_pack.blockskip_core.zoodip.word import WordLayout, WordPart

LAYOUT = WordLayout([WordPart("a", 2, 5, 0.01), WordPart("b", 1, 6, 3.0)])
FIRST = LAYOUT.sizes * torch.linspace(-1.0, 1.0, LAYOUT.numbers)
TARGET = LAYOUT.sizes * torch.linspace(2.0, -2.0, LAYOUT.numbers)


class Distance:
    """The squared distance to a target in units of size, changed a little by the example; counts its rows."""

    def __init__(self):
        self.rows = 0

    def __call__(self, words, example):
        self.rows += len(words)
        assert words.dtype == torch.float32
        return (((words - TARGET) / LAYOUT.sizes).square().mean(1) * (1.0 + example.level)).double()


def settings(**changes):
    return WordSettings(**{"steps": 12, "seed": 4, "directions": 3, "step_size": 0.3, **changes})


def trained(chosen, checkpoints=None, *, cut_after=None, losses=None):
    """Return (training, result, losses); with ``cut_after`` the run ends after that step."""
    losses, result = losses or Distance(), WordResult()
    examples = ExampleSchedule(
        chosen.seed, 2, lowest=chosen.lowest, highest=chosen.highest, pool=chosen.pool, mirror=chosen.mirror
    )
    training = WordTraining(losses, LAYOUT, FIRST, examples, chosen, result=result, checkpoints=checkpoints)

    def on_step(report):
        if report.step == cut_after:
            raise KeyboardInterrupt

    training.resume()
    try:
        training.run([OnStep(on_step)])
    except KeyboardInterrupt:
        pass
    return training, result, losses


def away(word):
    return ((word - TARGET) / LAYOUT.sizes).square().mean().item()


@pytest.mark.parametrize("estimator", ["leave-one-out", "forward difference", "central"])
def test_it_approaches_the_minimum(estimator):
    training, result, _ = trained(settings(steps=150, estimator=estimator, step_size=0.1))
    assert away(training.word) < 0.05 * away(FIRST)
    assert len(result.losses) == result.steps == 150
    assert result.losses[-1] < result.losses[0]


@pytest.mark.parametrize(("estimator", "passes"), [("leave-one-out", 3), ("forward difference", 4), ("central", 6)])
def test_every_forward_pass_is_counted(estimator, passes):
    chosen = settings(estimator=estimator)
    _, result, losses = trained(chosen)
    assert losses.rows == result.forwards == 12 * passes == 12 * chosen.passes_per_step


def test_the_paper_takes_three_passes_per_step_and_its_own_numbers():
    paper = paper_settings(10, 1)
    assert paper.passes_per_step == 3
    assert paper.perturbation * CLIP_L_SIZE == pytest.approx(1e-3)
    assert paper.step_size * CLIP_L_SIZE == pytest.approx(5e-3)
    assert (paper.subspace_every, paper.subspace_share, paper.lowest, paper.highest) == (128, 1e-3, 0.5, 0.9)
    assert paper.step_size_at(9) == paper.step_size


def test_the_step_size_falls_to_zero_as_a_cosine():
    chosen = settings(steps=4, step_size=2.0)
    assert [chosen.step_size_at(step) for step in range(4)] == pytest.approx([2.0, 1.7071, 1.0, 0.2929], abs=1e-4)


def test_the_first_step_moves_every_number_by_the_step_size_in_its_own_unit():
    training, _, _ = trained(settings(steps=1))
    torch.testing.assert_close((training.word - FIRST).abs(), 0.3 * LAYOUT.sizes, rtol=1e-4, atol=0.0)


RICH = settings(estimator="central", pool=5, mirror=True, subspace_every=3, subspace_share=0.2, schedule="constant")


@pytest.mark.parametrize("cut_after", [1, 3, 5, 11])
def test_a_run_cut_anywhere_resumes_to_the_same_bits(tmp_path, cut_after):
    whole, expected, _ = trained(RICH)
    store = lambda: Checkpoints(tmp_path / "run", RunIdentity({"word": 1}), every=4, keep=2)  # noqa: E731
    cut, _, _ = trained(RICH, store(), cut_after=cut_after)
    assert not torch.equal(cut.word, whole.word)
    resumed, result, losses = trained(RICH, store())
    assert torch.equal(resumed.word, whole.word)
    assert result.losses == expected.losses
    assert (result.steps, result.resumed_at) == (12, cut_after)
    assert losses.rows == (12 - cut_after) * RICH.passes_per_step
    assert resumed.num_removed == whole.num_removed > 0


def test_two_runs_with_one_seed_are_equal_and_another_seed_differs():
    first, second = trained(RICH)[0].word, trained(RICH)[0].word
    assert torch.equal(first, second)
    assert not torch.equal(first, trained(dataclasses.replace(RICH, seed=5))[0].word)


def test_perturbations_leave_no_trace_in_the_word():
    """With steps too small to change a float32 number, the word keeps its bits after any number of perturbations."""
    training, _, _ = trained(settings(steps=300, step_size=1e-12))
    assert torch.equal(training.word, FIRST)


def test_a_loss_that_is_not_finite_ends_the_run_before_it_changes_the_word():
    class Broken(Distance):
        def __call__(self, words, example):
            return super().__call__(words, example) * (float("nan") if self.rows > 9 else 1.0)

    chosen, losses = settings(), Broken()
    result = WordResult()
    examples = ExampleSchedule(4, 2, lowest=0.0, highest=1.0, pool=chosen.pool)
    training = WordTraining(losses, LAYOUT, FIRST, examples, chosen, result=result)
    with pytest.raises(TrainingError, match="The loss of step 4 is not finite"):
        training.run()
    assert result.steps == 3
    assert torch.equal(training.word, trained(chosen, cut_after=3)[0].word)


@pytest.mark.parametrize(
    "wrong", [{"steps": 0}, {"directions": 1}, {"directions": 10**6}, {"perturbation": 0.0}, {"step_size": float("inf")},
              {"epsilon": -1.0}, {"schedule": "step"}, {"estimator": "newton"}]
)  # fmt: skip
def test_settings_out_of_range_are_refused(wrong):
    with pytest.raises(InvalidInputError):
        settings(**wrong)


@pytest.mark.parametrize("cut_after", [None, 5])
def test_a_full_disk_costs_the_states_and_not_the_run(tmp_path, monkeypatch, cut_after):
    expected, _, _ = trained(settings(), cut_after=cut_after)
    kept = Checkpoints(tmp_path / "run", RunIdentity({"word": 1}), every=2, keep=2)

    def full(state):
        raise StorageError("The training state could not be written.")

    monkeypatch.setattr(kept, "save", full)
    training, result, _ = trained(settings(), kept, cut_after=cut_after)
    assert torch.equal(training.word, expected.word)
    assert result.steps == (cut_after or settings().steps)
    assert result.problems == ["The training state could not be written."]

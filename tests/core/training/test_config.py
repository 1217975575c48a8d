"""Settings out of range are refused."""

import pytest
from blockskip_pack.blockskip_core.errors import InvalidInputError
from blockskip_pack.blockskip_core.training.config import TrainingConfig


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"steps": 0}, "steps must be at least 1, got 0"),
        ({"batch_size": 0}, "batch_size must be at least 1"),
        ({"accumulation": -1}, "accumulation must be at least 1"),
        ({"learning_rate": 0.0}, "learning_rate must be positive"),
        ({"learning_rate": float("nan")}, "learning_rate must be positive"),
        ({"learning_rate": float("inf")}, "learning_rate must be positive"),
        ({"max_grad_norm": -1.0}, "max_grad_norm must not be negative"),
        ({"weight_decay": float("nan")}, "weight_decay must not be negative"),
        ({"warmup_steps": -1}, "warmup_steps must not be negative"),
        ({"lr_schedule": "sawtooth"}, "lr_schedule must be one of constant"),
        ({"loss_weighting": "all"}, "loss_weighting must be one of none"),
    ],
)
def test_settings_out_of_range_are_refused(settings, message):
    with pytest.raises(InvalidInputError, match=message):
        TrainingConfig(**{"steps": 1, **settings})

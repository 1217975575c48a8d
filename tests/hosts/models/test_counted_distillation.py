"""The memory of a distillation, counted without weights, is that of a real one."""

import pytest
import torch
from blockskip_pack.blockskip_core.accounting.measuring import Counting
from blockskip_pack.blockskip_core.adapters.lora import LoraSettings
from blockskip_pack.blockskip_core.distillation.loop import DistillationResult, distill
from blockskip_pack.blockskip_core.distillation.settings import DistillationSettings

from ..tiny_families import FAMILIES, FLUX
from .test_coarse_distillation import opened

pytestmark = pytest.mark.usefixtures("comfyui")
LORA = LoraSettings(rank=2, alpha=2.0, targets="mlp")


WAN = next(family for family in FAMILIES if family.name == "wan21")


@pytest.mark.parametrize(
    ("family", "frames", "build"),
    [(FLUX, 1, {}), (FLUX, 1, {"cast_to": torch.float16}), (WAN, 3, {})],
    ids=["flux", "flux in float16", "clips of wan"],
)
def test_it_is_what_real_steps_take(monkeypatch, family, frames, build):
    from blockskip_pack.blockskip_core.hosts.models import hosted_dit
    from blockskip_pack.blockskip_core.hosts.models.coarse_distillation import distilling
    from blockskip_pack.blockskip_core.hosts.models.counted_distillation import OneMeasured, counted_distillation

    monkeypatch.setattr(hosted_dit, "_WITH_BACKWARD", ("attention_pytorch",))
    _, dit, parts, clean = opened(family, frames=frames, **build)
    count = counted_distillation(dit, clean.shape[1:], 2, LORA, 3)
    examples = OneMeasured(clean[:2], [1, 0], lambda uniform: 0.5, 0)
    settings = DistillationSettings(steps=2, batch_size=3, learning_rate=1e-4, validate_every=2)
    after = []
    with Counting() as counting:
        counting.hold(parts.parameters())
        with distilling(dit, parts) as model:
            distill(
                model, examples, settings, result=DistillationResult(),
                on_step=lambda _: after.append(counting.operations),
            )  # fmt: skip
    assert count.operations == after[-1] - after[-2]
    on_device = count.peak - count.weights
    assert on_device <= counting.peak(torch.device("cpu")) <= on_device + count.host, "here both are on the CPU"

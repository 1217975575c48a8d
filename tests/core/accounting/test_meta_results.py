"""The remembered result of an operation on ``meta`` has the form of the real one, and only new tensors are remembered."""

from __future__ import annotations

import pytest
import torch
from blockskip_pack.blockskip_core.accounting.meta_results import result_on_meta
from torch import nn

aten = torch.ops.aten
META = torch.device("meta")


def on_meta(*shape, dtype=torch.float32):
    return torch.empty(*shape, dtype=dtype, device=META)


def form(tensor):
    return tensor.shape, tensor.stride(), tensor.dtype, tensor.device, tensor.untyped_storage().nbytes()


NEW = {
    "sum of two dtypes": (aten.add.Tensor, on_meta(2, 3), on_meta(3, dtype=torch.bfloat16)),
    "transposed": (aten.mul.Tensor, on_meta(4, 3).T, on_meta(4, 3).T),
    "expanded": (aten.mul.Tensor, on_meta(1, 3).expand(4, 3), on_meta(4, 1)),
    "a part": (aten.gelu.default, on_meta(6, 8)[2:, ::2]),
    "a parameter": (aten.mm.default, on_meta(2, 3), nn.Parameter(on_meta(3, 4), requires_grad=False)),
    "a list": (aten.cat.default, [on_meta(2, 3), on_meta(5, 3)]),
    "a reduction": (aten.sum.dim_IntList, on_meta(2, 3, 4), [1]),
    "no numbers": (aten.exp.default, on_meta(0, 3)),
}


@pytest.mark.parametrize(("func", "args"), [(func, args) for func, *args in NEW.values()], ids=NEW)
def test_the_form_is_that_of_the_real_result(func, args):
    for _ in range(2):
        found = result_on_meta(func, args, {})
        assert form(found) == form(func(*args))
        assert found.untyped_storage()._cdata != result_on_meta(func, args, {}).untyped_storage()._cdata


def test_keywords_count():
    x = on_meta(2, 3)
    half, double = (result_on_meta(aten._to_copy.default, [x], {"dtype": kind}) for kind in (torch.half, torch.double))
    assert (half.dtype, double.dtype) == (torch.half, torch.double)


def test_numbers_that_are_equal_are_told_apart_by_their_types():
    x = on_meta(3, dtype=torch.bool)
    kinds = [result_on_meta(aten.add.Scalar, [x, number], {}).dtype for number in (1, 1.0)]
    assert kinds == [torch.int64, torch.float32] == [aten.add.Scalar(x, number).dtype for number in (1, 1.0)]


def test_an_operation_runs_once_for_all_inputs_of_a_form(monkeypatch):
    calls = []

    class Operation:
        _schema = aten.exp.default._schema

        def __call__(self, x):
            calls.append(x)
            return aten.exp.default(x)

    operation = Operation()
    for _ in range(3):
        assert result_on_meta(operation, [on_meta(7, 5)], {}).shape == (7, 5)
    assert len(calls) == 1
    assert result_on_meta(operation, [on_meta(5, 7).T], {}).stride() == (1, 7)
    assert len(calls) == 2


MUST_BE_RUN = {
    "a view": (aten.transpose.int, on_meta(2, 3), 0, 1),
    "a view that its schema does not declare": (aten._unsafe_view.default, on_meta(2, 3), [6]),
    "it also writes to an input": (aten.rrelu_with_noise.default, on_meta(2), on_meta(2)),
    "in place": (aten.add_.Tensor, on_meta(2), on_meta(2)),
    "on the CPU": (aten.exp.default, torch.ones(2)),
    "several results": (aten.max.dim, on_meta(2, 3), 0),
    "one input on another device": (aten.add.Tensor, on_meta(2), torch.ones(())),
    "a conjugate": (aten.exp.default, on_meta(2, dtype=torch.complex64).conj()),
    "no input": (aten.zeros.default, [2, 3]),
    "a generator": (aten.bernoulli.default, on_meta(2)),
}


@pytest.mark.parametrize(("func", "args"), [(func, args) for func, *args in MUST_BE_RUN.values()], ids=MUST_BE_RUN)
def test_what_is_not_a_new_tensor_of_plain_inputs_must_be_run(func, args):
    kwargs = {"generator": torch.Generator()} if func is aten.bernoulli.default else {}
    assert result_on_meta(func, args, kwargs) is None

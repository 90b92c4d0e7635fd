"""Promises of linear layers through oneDNN: the same results, gradients and bytes, and never for layers that learn."""

from __future__ import annotations

import copy
from typing import Any

import pytest

from jobs.core import linear

ROWS, IN, OUT = 200, 192, 320  # enough work for oneDNN


@pytest.fixture
def amd(monkeypatch: pytest.MonkeyPatch) -> None:
    """A processor on which MKL is slow; oneDNN computes on all of them."""
    monkeypatch.setattr(linear, "mkl_is_slow", lambda: True)


def layer(kind: str) -> Any:
    """A frozen layer in a model, as it comes from `load_model` and as PEFT freezes it."""
    import torch
    from transformers.pytorch_utils import Conv1D

    torch.manual_seed(0)
    chosen = Conv1D(OUT, IN) if kind == "Conv1D" else torch.nn.Linear(IN, OUT, bias=kind == "bias")
    return torch.nn.Sequential(chosen).requires_grad_(False)


def outcome(model: Any, x: Any) -> tuple[Any, Any]:
    """What the model computes, and the gradient of its input."""
    x = x.clone().requires_grad_()
    y = model(x)
    (y * y.detach().cos()).sum().backward()
    return y.detach(), x.grad


@pytest.mark.usefixtures("amd")
@pytest.mark.parametrize("kind", ["plain", "bias", "Conv1D"])
def test_results_and_gradients_are_those_of_torch_and_the_same_every_time(kind: str) -> None:
    import torch

    model = layer(kind)
    faster = copy.deepcopy(model)
    linear.use_onednn(faster)
    assert type(faster[0]) is not type(model[0])
    x = torch.randn(2, ROWS // 2, IN)
    for expected, found, again in zip(outcome(model, x), outcome(faster, x), outcome(faster, x), strict=True):
        assert ((found - expected).abs().max() / expected.abs().max()).item() < 1e-6
        assert torch.equal(found, again)


@pytest.mark.usefixtures("amd")
def test_rows_that_do_not_lie_one_behind_the_other_are_computed_right() -> None:
    import torch

    model = layer("plain")
    faster = copy.deepcopy(model)
    linear.use_onednn(faster)
    x = torch.randn(IN, ROWS).t()
    for expected, found in zip(outcome(model, x), outcome(faster, x), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.usefixtures("amd")
def test_a_layer_that_learns_gets_its_gradient() -> None:
    import torch

    model = layer("bias").requires_grad_(True)
    linear.use_onednn(model)
    model(torch.randn(ROWS, IN)).sum().backward()
    assert model[0].weight.grad is not None and model[0].bias.grad is not None


@pytest.mark.usefixtures("amd")
@pytest.mark.parametrize(("rows", "dtype"), [(0, "float32"), (1, "float32"), (ROWS, "bfloat16"), (ROWS, "float64")])
def test_other_inputs_are_computed_as_before(rows: int, dtype: str) -> None:
    import torch

    model = layer("bias").to(getattr(torch, dtype))
    faster = copy.deepcopy(model)
    linear.use_onednn(faster)
    x = torch.randn(rows, IN, dtype=getattr(torch, dtype))
    assert torch.equal(faster(x), model(x))


def test_on_other_processors_nothing_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear, "mkl_is_slow", lambda: False)
    model = layer("plain")
    before = type(model[0])
    linear.use_onednn(model)
    assert type(model[0]) is before


@pytest.mark.usefixtures("amd")
def test_a_model_is_saved_as_before() -> None:
    import torch

    model = layer("Conv1D")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    linear.use_onednn(model)
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.usefixtures("amd")
def test_batches_of_many_lengths_do_not_fill_the_memory() -> None:
    """oneDNN keeps a megabyte or more for each number of rows that it has seen."""
    import psutil
    import torch

    model = layer("plain")
    linear.use_onednn(model)
    x = torch.randn(900, IN)
    model(x)
    before = psutil.Process().memory_info().rss
    for rows in range(200, 900):
        model(x[:rows])
    assert psutil.Process().memory_info().rss - before < 60e6

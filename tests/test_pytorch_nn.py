# SPDX-License-Identifier: BSD-3-Clause
"""What PyTorch's test_nn.py checks of cross-entropy besides its OpInfo and ModuleInfo, in our words.

By softce's names and, installed, by torch's.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator

import pytest
import torch
from checks import kernel_calls
from pytorch_ways import REFERENCE, WAYS, Way, take
from torch import nn

import softce

D = torch.float64
SHAPES = [(5, 3), (5, 3, 2), (5, 3, 4, 5), (5, 3, 4, 5, 2)]
# These tests are about the kernels; the formula is covered by the others.
pytestmark = pytest.mark.usefixtures("cpu_kernels")


@pytest.fixture(params=WAYS)
def way(request: pytest.FixtureRequest) -> Iterator[Way]:
    with take(request.param) as way:
        yield way


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("weighted", [False, True])
def test_probabilities_in_all_reductions(way: Way, shape: tuple[int, ...], weighted: bool) -> None:
    x = torch.randn(shape, requires_grad=True)
    t = torch.randn(shape, requires_grad=True)
    w = torch.randn(shape[1]).abs() if weighted else None
    for reduction in ("none", "mean", "sum"):
        got = way.module(reduction=reduction, weight=w)(x, t)
        torch.testing.assert_close(got, REFERENCE(x, t, reduction=reduction, weight=w))


def test_unit_weights_are_no_weights(way: Way) -> None:
    for shape in SHAPES:
        x = torch.randn(shape, requires_grad=True)
        for t in (torch.randn(shape, requires_grad=True), torch.randint(shape[1], (shape[0], *shape[2:]))):
            for reduction in ("none", "mean", "sum"):
                got = way.module(reduction=reduction, weight=torch.ones(shape[1]))(x, t)
                torch.testing.assert_close(got, way.module(reduction=reduction)(x, t))


def test_one_hot_probabilities_are_indices(way: Way) -> None:
    for shape in SHAPES:
        x = torch.randn(shape, dtype=D)
        y = torch.randint(shape[1], (shape[0], *shape[2:]))
        one_hot = nn.functional.one_hot(y, shape[1]).to(D).movedim(-1, 1)
        w = torch.rand(shape[1], dtype=D)
        for reduction in ("none", "mean", "sum"):
            for smoothing in (0.0, 0.01, 0.3):
                with_weight = None if reduction == "mean" else w  # the two divide by different masses
                kwargs = {"reduction": reduction, "label_smoothing": smoothing, "weight": with_weight}
                torch.testing.assert_close(way.function(x, one_hot, **kwargs), way.function(x, y, **kwargs))


def test_label_smoothing_by_hand(way: Way) -> None:
    for shape in SHAPES:
        x, t = torch.randn(shape, dtype=D), torch.randn(shape, dtype=D).softmax(1)
        for e in (0.05, 0.3, 1.0):
            want = way.function(x, t * (1 - e) + e / shape[1])
            torch.testing.assert_close(way.function(x, t, label_smoothing=e), want)


def test_label_smoothing_with_weight_and_ignored(way: Way) -> None:
    """Ignored positions count nowhere, whatever their class would weigh."""
    for reduction in ("none", "mean", "sum"):
        for weighted in (False, True):
            x = torch.randn(8, 4)
            y = torch.randint(4, (8,))
            w = torch.rand(4) if weighted else None
            y[2], y[5] = 4, 4
            kept = y != 4
            loss = way.module(reduction=reduction, label_smoothing=0.05, ignore_index=4, weight=w)
            got = loss(x, y)
            want = way.module(reduction=reduction, label_smoothing=0.05, weight=w)(x[kept], y[kept])
            if reduction == "none":
                assert torch.equal(got[~kept], torch.zeros(2))
                got = got[kept]
            torch.testing.assert_close(got, want)


def test_label_smoothing_and_shape_errors(way: Way) -> None:
    x = torch.randn(3, 4)
    for bad, kind, message in (
        ((x, torch.randint(3, (3,)).float()), RuntimeError, "expected target dtype to be Long or Byte"),
        ((x, torch.tensor(1)), ValueError, "batch_size"),
        ((torch.randn(3), torch.tensor([0, 1])), ValueError, "size 1"),
    ):
        with pytest.raises(kind, match=message):
            way.function(*bad)
    with pytest.raises(RuntimeError, match="label_smoothing must be between"):
        way.function(x, torch.randint(4, (3,)), label_smoothing=1.2)


def test_single_precision_agrees_with_double(way: Way) -> None:
    """A large two-class segmentation, as in test_nn.py but a hundredth of its size."""
    x = torch.randn(8, 2, 96, 96)
    y = torch.randint(2, (8, 96, 96))
    torch.testing.assert_close(way.module()(x, y), way.module()(x.double(), y).float())


def test_empty_batches(way: Way) -> None:
    x = torch.randn(0, 3, requires_grad=True)
    y = torch.empty(0, dtype=torch.int64)
    assert way.function(x, y, reduction="none").shape == (0,)
    assert way.function(x, y, reduction="sum") == 0
    assert way.function(x, y).isnan()
    assert way.function(torch.randn(2, 3, 0), torch.empty(2, 0, dtype=torch.int64)).isnan()


def test_invalid_reduction(way: Way) -> None:
    with pytest.raises(ValueError, match="is not a valid value for reduction"):
        way.function(torch.randn(3, 5), torch.tensor([1, 0, 4]), reduction="total")


def test_out_of_range_index(way: Way) -> None:
    for target in (torch.tensor([0, 3, 1]), torch.tensor([0, -5, 1])):
        with pytest.raises(IndexError):
            way.function(torch.randn(3, 3), target)


def test_scripted_module_still_runs() -> None:
    """torch.jit.script of torch's module, with softce installed."""
    x, y = torch.randn(3, 5), torch.tensor([1, 0, 4])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.jit.script is deprecated, and still there
        scripted = torch.jit.script(nn.CrossEntropyLoss())
    want = scripted(x, y)
    with softce.installed(), kernel_calls() as calls:
        got = scripted(x, y)
    torch.testing.assert_close(got, want)
    assert calls

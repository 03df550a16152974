# SPDX-License-Identifier: BSD-3-Clause
"""What ``softce.cross_entropy`` refuses: torch's error types, messages that name the argument."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import softce

# ---- errors: torch's types, and messages that name the argument ----

X, Y = torch.randn(3, 4), torch.tensor([0, 1, 2])
T = torch.rand(3, 4)
ERRORS: dict[str, tuple[tuple[Any, ...], dict[str, Any], type[Exception], str]] = {
    "batch": ((X, torch.tensor([0, 1])), {}, ValueError, r"input batch_size \(3\) to match target batch_size \(2\)"),
    "batch of probabilities": ((X, torch.rand(2, 4)), {}, ValueError, r"batch_size \(3\) to match target batch_size"),
    "0-dim target": ((X, torch.tensor(0)), {}, ValueError, "batch_size"),
    "spatial": ((torch.randn(2, 3, 5), torch.zeros(2, 4, dtype=torch.int64)), {}, RuntimeError, "Expected target size"),
    "spatial probabilities": ((torch.randn(2, 3, 5), torch.rand(2, 3, 4)), {}, RuntimeError, "target"),
    "more dimensions": ((X, torch.zeros(3, 1, dtype=torch.int64)), {}, RuntimeError, "target"),
    "unbatched": ((torch.randn(4), torch.tensor([0, 1])), {}, ValueError, "size 1, but got target size: .*2"),
    "unbatched, 2d": (
        (torch.randn(4), torch.zeros(1, 1, dtype=torch.int64)),
        {},
        RuntimeError,
        r"target size: \[1, 1\]",
    ),
    "batch of regression targets": ((X, torch.rand(5)), {}, ValueError, r"batch_size \(3\) to match target batch_size"),
    "unbatched regression targets": ((torch.randn(4), torch.rand(2)), {}, RuntimeError, "Long or Byte"),
    "sparse input": ((X.to_sparse(), Y), {}, NotImplementedError, "input must be a dense tensor, got layout.*to_dense"),
    "sparse target": ((X, Y.to_sparse()), {}, NotImplementedError, "target must be a dense tensor"),
    "int32": ((X, Y.int()), {}, RuntimeError, "expected target dtype to be Long or Byte, but got torch.int32"),
    "int16": ((X, Y.short()), {}, RuntimeError, "Long or Byte"),
    "int8": ((X, Y.to(torch.int8)), {}, RuntimeError, "Long or Byte"),
    "bool": ((X, Y.bool()), {}, RuntimeError, "Long or Byte"),
    "float indices": ((X, Y.float()), {}, RuntimeError, "Long or Byte"),
    "int64 of the input's shape": (
        (X, T.long()),
        {},
        RuntimeError,
        "Expected floating point type for target with class",
    ),
    "out of range": ((X, torch.tensor([0, 4, 2])), {}, IndexError, "4"),
    "negative": ((X, torch.tensor([0, -1, 2])), {}, IndexError, "-1"),
    "out of range, smoothed": ((X, torch.tensor([0, 4, 2])), {"label_smoothing": 0.1}, IndexError, "4"),
    "out of range, planes": ((torch.randn(1, 4, 3), torch.tensor([[0, 9, 2]])), {}, IndexError, "9"),
    "ignored index, not given": ((X, torch.tensor([0, -100, 2])), {"ignore_index": 0}, IndexError, "-100"),
    "weight shape": (
        (X, Y),
        {"weight": torch.rand(3)},
        RuntimeError,
        "weight tensor should be defined either for all 4",
    ),
    "weight 2d": ((X, Y), {"weight": torch.rand(1, 4)}, RuntimeError, "weight"),
    "weight dtype": ((X, Y), {"weight": torch.rand(4).double()}, RuntimeError, "weight.*"),
    "weight half": ((X, Y), {"weight": torch.rand(4).half()}, RuntimeError, "weight"),
    "weight double for half": ((X.half(), Y), {"weight": torch.rand(4).double()}, RuntimeError, "weight"),
    "weight requires grad": ((X, Y), {"weight": torch.rand(4, requires_grad=True)}, RuntimeError, "weight"),
    "weight shape, probabilities": ((X, T), {"weight": torch.rand(3)}, RuntimeError, "weight"),
    "ignore_index, probabilities": (
        (X, T),
        {"ignore_index": 1},
        RuntimeError,
        "ignore_index is not supported for floating",
    ),
    "reduction": ((X, Y), {"reduction": "average"}, ValueError, "average is not a valid value for reduction"),
    "reduction None": ((X, Y), {"reduction": None}, ValueError, "reduction"),
    "label_smoothing": ((X, Y), {"label_smoothing": 1.5}, RuntimeError, "label_smoothing must be between 0.0 and 1.0"),
    "label_smoothing, probabilities": ((X, T), {"label_smoothing": 1.01}, RuntimeError, "label_smoothing"),
    "scalar input": ((torch.tensor(1.0), torch.tensor(0)), {}, Exception, "input|dimension|target"),
    "integer input": ((T.long(), Y), {}, NotImplementedError, "input|not implemented"),
    "input type": (([1.0, 2.0], Y), {}, TypeError, "input"),
    "target type": ((X, [0, 1, 2]), {}, TypeError, "target"),
    "target None": ((X, None), {}, TypeError, "target"),
    "weight type": ((X, Y), {"weight": [1.0] * 4}, TypeError, "weight"),
    "ignore_index type": ((X, Y), {"ignore_index": 1.5}, TypeError, "ignore_index"),
    "ignore_index bool": ((X, Y), {"ignore_index": True}, TypeError, "ignore_index must be int, not bool"),
    "ignore_index list": ((X, Y), {"ignore_index": [1]}, TypeError, "ignore_index must be int, not list"),
    "ignore_index float tensor": ((X, Y), {"ignore_index": torch.tensor(1.0)}, TypeError, "ignore_index must be int"),
    "label_smoothing type": ((X, Y), {"label_smoothing": "much"}, TypeError, "label_smoothing"),
    "label_smoothing list": ((X, Y), {"label_smoothing": [0.1]}, TypeError, "label_smoothing must be float, not list"),
    "label_smoothing of classes": (
        (X, Y),
        {"label_smoothing": torch.rand(4)},
        TypeError,
        "label_smoothing must be float",
    ),
    "label_smoothing with gradient": (
        (X, Y),
        {"label_smoothing": torch.tensor(0.1, requires_grad=True)},
        TypeError,
        "label_smoothing must be float, not Tensor; it is a constant",
    ),
}


# What older releases of torch raise instead: softce raises what 2.13 does.
BEFORE_2_13 = {"unbatched regression targets": ValueError} if torch.__version__ < (2, 13) else {}


@pytest.mark.parametrize("name", ERRORS)
def test_errors(name: str, options: softce.Options) -> None:
    """The type that torch raises for the same call, and a message that says what is wrong."""
    args, kwargs, kind, message = ERRORS[name]
    with pytest.raises(BEFORE_2_13.get(name, kind)):
        F.cross_entropy(*args, **kwargs).backward()
    for more in ({"options": options}, {}):
        with pytest.raises(kind, match=message):
            softce.cross_entropy(*args, **more, **kwargs)


@pytest.mark.parametrize("number", [torch.tensor(1), np.int64(1), np.uint8(1)])
def test_numbers_of_other_kinds(number: Any) -> None:
    """Of NumPy, and tensors of one: what torch takes."""
    x = X.clone().requires_grad_()
    for kwargs in ({"ignore_index": number}, {"label_smoothing": number * 0.5}, {"label_smoothing": number}):
        torch.testing.assert_close(softce.cross_entropy(x, Y, **kwargs), F.cross_entropy(x, Y, **kwargs))


def test_old_name_of_the_mean() -> None:
    for loss in (F.cross_entropy, softce.cross_entropy, softce.binary_cross_entropy_with_logits):
        target = Y if loss is not softce.binary_cross_entropy_with_logits else T
        with pytest.warns(UserWarning, match="elementwise_mean"):
            got = loss(X, target, reduction="elementwise_mean")
        assert torch.equal(got, loss(X, target))


def test_nested_tensors_are_refused() -> None:
    nested = torch.nested.nested_tensor([torch.randn(2, 4), torch.randn(3, 4)], layout=torch.jagged)
    with pytest.raises(NotImplementedError, match="input must be a dense tensor, got a nested one"):
        softce.cross_entropy(nested, Y)
    with pytest.raises(NotImplementedError, match="Teacher: logits must be a dense tensor"):
        softce.Teacher(nested)
    strided = torch.nested.nested_tensor([torch.randn(2, 4), torch.randn(3, 4)]).requires_grad_()
    with pytest.raises(NotImplementedError, match="input must be a dense tensor, got a nested one"):
        softce.cross_entropy(strided, Y)
    rows = torch.nested.nested_tensor([torch.zeros(2, dtype=torch.int64), torch.zeros(1, dtype=torch.int64)])
    with pytest.raises(NotImplementedError, match="target must be a dense tensor, got a nested one"):
        softce.cross_entropy(X.float().requires_grad_(), rows)


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this torch has no oneDNN")
def test_opaque_layouts_are_refused() -> None:
    x, t = torch.randn(3, 4, requires_grad=True), torch.rand(3, 4)
    with pytest.raises(NotImplementedError, match="input must be a dense tensor, got layout"):
        softce.cross_entropy(x.to_mkldnn(), t)
    with pytest.raises(NotImplementedError, match="target must be a dense tensor, got layout"):
        softce.cross_entropy(x, t.to_mkldnn())


def test_no_gradient_of_an_index_out_of_range(options: softce.Options) -> None:
    """The error comes at the call, also when a gradient is wanted, and for every place that the index can stand in."""
    for rows in (1, 40, 3000):
        for bad in (rows - 1, 0, rows // 2):
            for value in (4, 2**40, -(2**40), -101):
                y = torch.zeros(rows, dtype=torch.int64)
                y[bad] = value
                for more in ({"options": options}, {}):
                    with pytest.raises(IndexError, match=str(value)):
                        softce.cross_entropy(torch.randn(rows, 4, requires_grad=True), y, **more)


@pytest.mark.parametrize("smoothing", [-0.5, math.nan])
def test_negative_label_smoothing_is_taken_as_zero(smoothing: float, options: softce.Options) -> None:
    """And nan, as in torch."""
    torch.testing.assert_close(F.cross_entropy(X, Y, label_smoothing=smoothing), F.cross_entropy(X, Y))
    for more in ({"options": options}, {}):
        with pytest.warns(UserWarning, match="label_smoothing"):
            got = softce.cross_entropy(X.clone().requires_grad_(), Y, label_smoothing=smoothing, **more)
        torch.testing.assert_close(got.detach(), F.cross_entropy(X, Y))


def test_weight_that_requires_grad_is_fine_where_torch_takes_it(backend: str) -> None:
    """With probabilities, and under no_grad."""
    w = torch.rand(4, dtype=torch.float64, requires_grad=True)
    x, t = torch.randn(3, 4, dtype=torch.float64), torch.rand(3, 4, dtype=torch.float64)
    grads = []
    for function in (F.cross_entropy, softce.cross_entropy):
        leaf = x.clone().requires_grad_()
        kwargs = {"options": softce.Options(backend=backend)} if function is softce.cross_entropy else {}
        grads.append(torch.autograd.grad(function(leaf, t, weight=w, label_smoothing=0.1, **kwargs), (leaf, w)))
    torch.testing.assert_close(grads[1], grads[0])

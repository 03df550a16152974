# SPDX-License-Identifier: BSD-3-Clause
"""What a target cannot be: errors and warnings that say what to do, and silence where nothing is wrong."""

from __future__ import annotations

import math
import subprocess
import sys
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import softce
from softce import validate


def _rows(shape: tuple[int, ...]) -> tuple[int, ...]:
    return () if len(shape) == 1 else (shape[0], *shape[2:])


@pytest.mark.parametrize("lam", [-0.1, 1.5, math.nan])
def test_mixup_weight_out_of_range(lam: float) -> None:
    a = torch.tensor([0, 1])
    with pytest.raises(ValueError, match=r"lam must be in \[0, 1\]"):
        softce.Mixup(a, a, lam)
    with pytest.raises(ValueError, match=r"lam must be in \[0, 1\]"):
        softce.Mixup(a, a, torch.tensor([0.5, lam]))


def test_mixup_shapes_and_types() -> None:
    a, x = torch.tensor([0, 1]), torch.randn(2, 3)
    with pytest.raises(TypeError, match="lam must be a number"):
        softce.Mixup(a, a, "0.5")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="lam must be a number or have shape"):
        softce.cross_entropy(x, softce.Mixup(a, a, torch.rand(3)))
    with pytest.raises(RuntimeError, match="lam must hold real numbers"):
        softce.Mixup(a, a, torch.tensor(0.5 + 0.0j))
    with pytest.raises(RuntimeError, match=r"Mixup.target_b .*regression"):
        softce.cross_entropy(x, softce.Mixup(a, a.float(), 0.5))
    with pytest.raises(ValueError, match=r"batch_size .*Mixup.target_b"):
        softce.cross_entropy(x, softce.Mixup(a, torch.tensor([0, 1, 2]), 0.5))


def test_target_forms_take_tensors() -> None:
    index = torch.tensor([[0], [1]])
    with pytest.raises(RuntimeError, match=r"TopK: .* with K > 0, got \[2, 0\]"):
        softce.TopK(index[:, :0], torch.rand(2, 0))
    for make, name in (
        (lambda: softce.TopK([[0], [1]], torch.rand(2, 1)), "TopK: index"),  # type: ignore[arg-type]
        (lambda: softce.TopK(index, [[0.5], [0.5]]), "TopK: prob"),  # type: ignore[arg-type]
        (lambda: softce.Mixup([0, 1], index[:, 0], 0.5), "Mixup: target_a"),  # type: ignore[arg-type]
        (lambda: softce.Mixup(index[:, 0], [0, 1], 0.5), "Mixup: target_b"),  # type: ignore[arg-type]
        (lambda: softce.Teacher([[0.5, 0.5]]), "Teacher: logits"),  # type: ignore[arg-type]
    ):
        with pytest.raises(TypeError, match=f"{name} must be Tensor, not list"):
            make()


@pytest.mark.parametrize("bad", [3, -3])
def test_class_out_of_range_is_an_index_error(bad: int, options: softce.Options) -> None:
    x = torch.randn(2, 3, requires_grad=True)
    good, index = torch.tensor([0, 1]), torch.tensor([0, bad])
    for kwargs in ({}, {"weight": torch.rand(3)}, {"row_loss": softce.Focal(2.0, torch.rand(3))}):
        for target in (
            index,
            softce.Mixup(good, index, 0.5),
            softce.TopK(torch.tensor([[0, 1], [bad, 0]]), torch.full((2, 2), 0.5)),
            softce.TopK(torch.tensor([[0, 1], [bad, 0]]), torch.full((2, 2), 0.3), rest="uniform"),
        ):
            with pytest.raises(IndexError, match="out of"):
                softce.cross_entropy(x, target, options=options, **kwargs)


def test_top_k_values_and_shapes() -> None:
    x, index = torch.randn(2, 5), torch.tensor([[0, 1], [2, 3]])
    for value in (-0.2, math.nan, math.inf):
        with pytest.raises(ValueError, match=r"TopK: prob must hold finite probabilities.*log=True"):
            softce.cross_entropy(x, softce.TopK(index, torch.tensor([[0.5, 0.2], [value, 0.1]])))
    with pytest.raises(ValueError, match="log-probabilities"):
        softce.cross_entropy(x, softce.TopK(index, torch.full((2, 2), 0.4), log=True))
    with pytest.raises(ValueError, match="renormalize"):
        softce.cross_entropy(x, softce.TopK(index, torch.full((2, 2), 0.9), rest="uniform"))
    with pytest.raises(ValueError, match="rest must be"):
        softce.TopK(index, torch.rand(2, 2), rest="none")
    with pytest.raises(RuntimeError, match=r"int64, got torch.int32"):
        softce.TopK(index.int(), torch.rand(2, 2))
    with pytest.raises(RuntimeError, match="one shape"):
        softce.TopK(index, torch.rand(2, 3))
    with pytest.raises(ValueError, match="batch_size"):
        softce.cross_entropy(torch.randn(3, 5), softce.TopK(index, torch.rand(2, 2)))


def test_teacher_arguments() -> None:
    for temperature in (0.0, -1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match="temperature must be positive"):
            softce.Teacher(torch.randn(2, 3), temperature)
    with pytest.raises(RuntimeError, match="floating point"):
        softce.Teacher(torch.tensor([[1, 2]]))
    with pytest.raises(RuntimeError, match="Teacher"):
        softce.cross_entropy(torch.randn(2, 3), softce.Teacher(torch.randn(2, 4)))


def test_regression_targets_are_refused() -> None:
    x = torch.randn(4, 3)
    for target in (torch.randn(4), torch.randn(4, 1), torch.randn(4, 2)):
        with pytest.raises(RuntimeError, match="regression"):
            softce.cross_entropy(x, target)
    with pytest.raises(RuntimeError, match=r"target.float\(\)"):
        softce.cross_entropy(x, torch.eye(4, 3, dtype=torch.int64))


def _told(call: Callable[[], Any]) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        call()
    return [str(w.message) for w in caught]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(5, 7), (3, 4, 2, 2), (2, 100_000), (9,)])
def test_softmax_output_as_logits_warns_once(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    prob = torch.softmax(3 * torch.randn(shape), 1 if len(shape) > 1 else 0).to(dtype)
    target = torch.zeros(_rows(shape), dtype=torch.int64)

    def three_times() -> None:
        for _ in range(3):
            softce.cross_entropy(prob, target)

    told = _told(three_times)
    assert len(told) == 1 and "softmax" in told[0] and "from_probs=True" in told[0], told
    assert not _told(lambda: softce.cross_entropy(prob, target, from_probs=True))
    assert not _told(lambda: softce.cross_entropy(prob, target, options=softce.Options(validate=False)))
    assert not _told(lambda: softce.cross_entropy(3 * torch.randn(shape).to(dtype), target))


def test_softmax_output_at_an_odd_address_warns() -> None:
    """The first look reads whole elements at their own addresses: where they have none, the others are asked."""
    raw = bytearray(4 * 12 + 1)
    x = torch.frombuffer(raw, dtype=torch.float32, offset=1).view(3, 4)
    x.copy_(torch.softmax(torch.randn(3, 4), 1))
    assert x.data_ptr() % 4
    assert len(_told(lambda: validate.check_logits(x))) == 1
    x.sub_(1.0)
    assert not _told(lambda: validate.check_logits(x))


def test_no_softmax_warning_for_what_is_none() -> None:
    y = torch.tensor([0, 1])
    for x in (
        torch.zeros(2, 3),
        torch.rand(2, 3),
        torch.tensor([[0.5, 0.5, 0.0], [0.2, 0.2, 0.2]]),
        torch.full((2, 1), 1.0),
    ):
        assert not _told(lambda x=x: softce.cross_entropy(x, y.clamp(max=x.shape[1] - 1)))
    assert not _told(lambda: softce.cross_entropy(torch.empty(0, 3), y[:0], reduction="sum"))
    assert not _told(lambda: torch.func.vmap(lambda x: softce.cross_entropy(x, y))(torch.full((3, 2, 2), 0.5)))
    told = _told(lambda: softce.cross_entropy(torch.randn(2, 3), softce.Teacher(torch.full((2, 3), 1 / 3))))
    assert len(told) == 1 and "Teacher.logits" in told[0]


@pytest.mark.parametrize("value", [-0.3, math.nan])
@pytest.mark.parametrize("shape", [(4, 5), (40, 50_000), (6,), (3, 70_000, 2)])
def test_negative_and_nan_probabilities_warn(shape: tuple[int, ...], value: float) -> None:
    x = torch.randn(shape)
    target = torch.softmax(torch.randn(shape), 1 if len(shape) > 1 else 0)
    assert not _told(lambda: softce.cross_entropy(x, target))
    target[0] = value
    told = _told(lambda: softce.cross_entropy(x, target))
    assert len(told) == 1 and ("nan" if math.isnan(value) else "negative") in told[0], told


def test_nan_anywhere_in_a_large_target_is_found() -> None:
    target = torch.softmax(torch.randn(50, 5000), 1)
    target[7, 99] = math.nan
    assert target.numel() > validate.FULL
    told = _told(lambda: softce.cross_entropy(torch.randn(50, 5000), target))
    assert len(told) == 1 and "nan" in told[0]


def test_install_keeps_torch_silence() -> None:
    x, t = torch.softmax(torch.randn(3, 4), 1), torch.full((3, 4), -0.5)
    with softce.installed():
        assert not _told(lambda: F.cross_entropy(x, t))


def test_negative_smoothing_warns_every_time() -> None:
    x, y = torch.randn(2, 3), torch.tensor([0, 1])
    for _ in range(2):
        told = _told(lambda: softce.cross_entropy(x, y, label_smoothing=-0.1))
        assert len(told) == 1 and "between 0.0 and 1.0" in told[0]
    with pytest.raises(RuntimeError, match=r"between 0.0 and 1.0"):
        softce.cross_entropy(x, y, label_smoothing=1.1)


def test_warnings_point_at_the_caller() -> None:
    code = (
        "import torch, softce\n"
        "softce.CrossEntropyLoss()(torch.full((2, 4), 0.25), torch.tensor([0, 1]))\n"  # line 2
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "<string>:2: UserWarning: softce: input looks like the output of a softmax" in done.stderr

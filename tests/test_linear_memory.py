# SPDX-License-Identifier: BSD-3-Clause
"""The fused linear loss holds no logits, keeps its budget, says beforehand what it will do, and refuses early."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import softce
from softce import Options
from softce.linear import autograd
from softce.linear.loop import Loop

N, H, V = 96, 8, 1000
RUNS = {
    "linear_stats": autograd._run_stats,
    "linear_gradients": autograd._run_gradients,
    "linear_fused": autograd._run_fused,
}


class Allocations(TorchDispatchMode):
    """The largest storage in bytes that an operator returns, besides those of ``known``; looks into softce's own."""

    def __init__(self, *known: Tensor) -> None:
        super().__init__()
        self.known = {t.untyped_storage()._cdata for t in known}
        self.largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        own = RUNS.get(func._schema.name.partition("::")[2]) if func._schema.name.startswith("softce::") else None
        if own is not None:
            with self:
                return own(*args)
        made = func(*args, **(kwargs or {}))
        for t in made if isinstance(made, (tuple, list)) else (made,):
            if isinstance(t, Tensor) and t.untyped_storage()._cdata not in self.known:
                self.largest = max(self.largest, t.untyped_storage().nbytes())
        return made


def inputs(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    return torch.randn(N, H, dtype=dtype, requires_grad=True), torch.randn(V, H, dtype=dtype, requires_grad=True)


def targets() -> dict[str, Any]:
    index = torch.randint(V, (N,))
    return {
        "indices": index,
        "topk": softce.TopK(torch.randint(V, (N, 3)), torch.rand(N, 3).softmax(1)),
        "mixup": softce.Mixup(index, index.flip(0), 0.3),
        "probs": torch.rand(N, V),
        "half_probs": torch.rand(N, V).bfloat16(),
        "teacher": softce.Teacher(torch.randn(N, V), 2.0),
        "linear_teacher": softce.LinearTeacher(torch.randn(N, 4), torch.randn(V, 4)),
        "linear_teacher_kl": softce.LinearTeacher(torch.randn(N, 4), torch.randn(V, 4), divergence=True),
    }


OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "none": {"reduction": "none"},
    "smoothed": {"label_smoothing": 0.1, "z_loss": 0.01},
    "own": {"row_loss": lambda loss: loss**2},
    "stats": {"return_stats": True},
}


@pytest.mark.parametrize("budget", [None, 20 * V * 4], ids=["default", "tiles"])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("name", targets())
def test_no_tensor_is_as_large_as_the_logits(
    name: str, options: dict[str, Any], budget: int | None, cpu_kernels: None
) -> None:
    x, w = inputs()
    target = targets()[name]
    known = [target] if isinstance(target, Tensor) else [t for t in vars(target).values() if isinstance(t, Tensor)]
    with Allocations(x, w, *known) as seen:
        loss = softce.linear_cross_entropy(x, w, target, options=Options(memory_budget=budget), **options)
        loss = loss[0] if isinstance(loss, tuple) else loss
        loss.sum().backward()
    assert 0 < seen.largest <= N * V * 4 // 2
    if budget is not None and "kl" not in name:
        assert seen.largest <= max(budget, w.numel() * 4)


def test_the_count_above_can_fail() -> None:
    x, w = inputs()
    target = torch.randint(V, (N,))
    with Allocations(x, w) as seen:
        softce.linear_cross_entropy(x, w, target, options=Options(backend="reference")).backward()
    assert seen.largest >= N * V * 4


def test_half_precision_weights_are_widened_in_pieces(cpu_kernels: None) -> None:
    x, w = inputs(torch.bfloat16)
    x.requires_grad_(False)
    w.requires_grad_(False)
    target = torch.randint(V, (N,))
    with Allocations(x, w) as seen:
        softce.linear_cross_entropy(x, w, target, options=Options(memory_budget=6 * V * 4))
    assert seen.largest <= 6 * V * 4


def test_shift_copies_no_hidden_states(cpu_kernels: None) -> None:
    x, w = torch.randn(3, 32, 2 * V), torch.randn(V, 2 * V)
    with Allocations(x, w) as seen:
        softce.linear_cross_entropy(x, w, torch.randint(V, (3, 32)), shift=True)
    assert seen.largest < x.numel() * 4


# ---- plan ----


def meta(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, device="meta", dtype=dtype)


def test_plan_of_the_default_chunk() -> None:
    plan = softce.plan(meta(1024, 512), meta(32768, 512))
    assert (plan.rows, plan.classes, plan.chunks, plan.recompute) == (512, 32768, 2, False)
    assert plan.buffer_bytes == plan.peak_bytes == 512 * 32768 * 4
    assert plan.logits_bytes == 1024 * 32768 * 4
    assert plan.products == 3 and plan.flops == 3 * 2 * 1024 * 512 * 32768
    assert "64.0 MiB" in str(plan) and "2 chunks" in str(plan)


def test_plan_with_a_budget_takes_tiles() -> None:
    plan = softce.plan(meta(1024, 512), meta(131072, 512), options=Options(memory_budget=16 << 20))
    assert plan.recompute and plan.classes < 131072 and plan.products == 4
    assert plan.peak_bytes <= 16 << 20


def test_plan_in_the_docs_is_what_it_prints(capsys: pytest.CaptureFixture[str]) -> None:
    text = (Path(__file__).parent.parent / "docs" / "linear.md").read_text()
    (block,) = re.findall(r"```python\n(>>> .*?)```", text, re.DOTALL)
    lines = [(line[:4] in (">>> ", "... "), line) for line in block.splitlines()]
    exec("\n".join(line[4:] for code, line in lines if code), {"torch": torch, "softce": softce})
    assert capsys.readouterr().out.split() == " ".join(line for code, line in lines if not code).split()


def test_plan_of_half_precision_counts_the_accumulators() -> None:
    x, w = meta(1024, 512, dtype=torch.bfloat16), meta(32768, 512, dtype=torch.bfloat16)
    plan = softce.plan(x, w)
    assert plan.peak_bytes == plan.buffer_bytes + 4 * (x.numel() + w.numel())
    frozen = softce.plan(x.requires_grad_(), w)
    assert frozen.products == 2 and frozen.peak_bytes == frozen.buffer_bytes + 4 * x.numel()


@pytest.mark.parametrize("budget", [None, 1 << 20, 5 << 20])
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("name", ["indices", "probs", "teacher", "linear_teacher", "other_teacher"])
def test_plan_is_what_happens(
    name: str, dtype: torch.dtype, reduction: str, budget: int | None, cpu_kernels: None
) -> None:
    x, w = torch.randn(300, 16, dtype=dtype), torch.randn(5000, 16, dtype=dtype)
    x.requires_grad_()
    w.requires_grad_()
    target = {
        "indices": torch.randint(5000, (300,)),
        "probs": torch.rand(300, 5000, dtype=dtype),
        "teacher": softce.Teacher(torch.randn(300, 5000, dtype=dtype)),
        "linear_teacher": softce.LinearTeacher(torch.randn(300, 16, dtype=dtype), torch.randn(5000, 16, dtype=dtype)),
        "other_teacher": softce.LinearTeacher(torch.randn(300, 24).bfloat16(), torch.randn(5000, 24).bfloat16()),
    }[name]
    options = Options(memory_budget=budget)
    plan = softce.plan(x, w, target, reduction=reduction, options=options)
    flops = held = 0
    mm, addmm_, memory = torch.mm, Tensor.addmm_, Loop._memory

    def count(function: Any, *args: Any, **kwargs: Any) -> Any:
        nonlocal flops
        a, b = args[-2:]
        flops += 2 * a.shape[0] * a.shape[1] * b.shape[1]
        return function(*args, **kwargs)

    def counted(made: Tensor) -> Tensor:
        nonlocal held
        held += made.nbytes
        return made

    with (
        mock.patch.object(Loop, "_memory", lambda loop, size: counted(memory(loop, size))),
        mock.patch("torch.mm", lambda *args, **kwargs: count(mm, *args, **kwargs)),
        mock.patch.object(Tensor, "addmm_", lambda *args, **kwargs: count(addmm_, *args, **kwargs)),
    ):
        softce.linear_cross_entropy(x, w, target, reduction=reduction, options=options).sum().backward()  # type: ignore[union-attr]
    assert flops == plan.flops
    assert budget is None or plan.buffer_bytes <= budget
    loops = 1 if reduction == "mean" else 2
    assert 0 < held <= loops * plan.buffer_bytes


# ---- refusals ----


def test_errors_come_before_any_product() -> None:
    x, w = (t.detach() for t in inputs())
    index, prob, one = torch.randint(V, (N,)), torch.rand(N, V), torch.ones(N)
    planes, pair = w.view(V // 2, 2, H), torch.randint(V // 2, (N, 2))
    cases: list[tuple[type[Exception], str, tuple[Any, ...], dict[str, Any]]] = [
        (RuntimeError, "in_features", (x, w[:, :3], index), {}),
        (RuntimeError, "dimensionality at least 2", (x, w[0], index), {}),
        (RuntimeError, "linear_weight of the input's dtype", (x, w.double(), index), {}),
        (RuntimeError, "linear_bias of the input's dtype", (x, w, index), {"linear_bias": torch.ones(V).double()}),
        (RuntimeError, "linear_bias shape", (x, w, index), {"linear_bias": torch.ones(3)}),
        (RuntimeError, "linear_weight on the device", (x, w.to("meta"), index), {}),
        (RuntimeError, "target on the input's device", (x, w, index.to("meta")), {}),
        (NotImplementedError, "float8", (x.to(torch.float8_e5m2), w.to(torch.float8_e5m2), index), {}),
        (NotImplementedError, "floating point type for input, got torch.int64", (x.long(), w.long(), index), {}),
        (NotImplementedError, "linear_weight must be a dense tensor", (x, w.to_sparse(), index), {}),
        (ValueError, "batch_size", (x, w, index[:5]), {}),
        (RuntimeError, "target size", (x.view(4, 24, H), w, index.view(4, 24)[:, :5]), {}),
        (RuntimeError, "class probabilities", (x, w, prob[:, 1:]), {}),
        (RuntimeError, "Long or Byte", (x, w, index.int()), {}),
        (RuntimeError, "not supported for floating point", (x, w, prob), {"ignore_index": 5}),
        (IndexError, r"value 1000 in row 0, expected 0 <= target < 1000", (x, w, index * 0 + V), {}),
        (IndexError, "value -1 in row 0", (x, w, index * 0 - 1), {"label_smoothing": 0.1}),
        (IndexError, "value 1000", (x, w, softce.TopK(index[:, None] * 0 + V, one[:, None])), {}),
        (IndexError, "value 1000", (x, w, index * 0 + V), {"options": Options(backend="reference")}),
        (ValueError, "one row of 1000 logits takes 4000 bytes", (x, w, index), {"options": Options(memory_budget=9)}),
        (ValueError, "valid value for reduction", (x, w, index), {"reduction": "avg"}),
        (ValueError, "row_weight must have shape", (x, w, index), {"row_weight": torch.ones(3)}),
        (ValueError, "shift=True needs", (x[0], w, index[0]), {"shift": True}),
        (ValueError, "shift=True needs", (x, w.view(V // 2, 2, H), index), {"shift": True}),
        (RuntimeError, "label_smoothing", (x, w, index), {"label_smoothing": 1.5}),
        (ValueError, "temperature", (x, w, index), {"temperature": 0.0}),
        (ValueError, "one factor for each", (x, w, index), {"row_loss": softce.Focal(1.0, torch.ones(3))}),
        (RuntimeError, "weight tensor should be defined", (x, w, index), {"weight": torch.ones(3)}),
        (RuntimeError, "does not run on device cpu", (x, w, index), {"options": Options(backend="cuda")}),
        (TypeError, "softce target, not list", (x, w, [1, 2]), {}),
        (TypeError, "linear_weight must be Tensor", (x, None, index), {}),
        (TypeError, r"options must be softce\.Options", (x, w, index), {"options": {}}),
        (ValueError, "batch_size", (x, w, softce.LinearTeacher(x[:3], w)), {}),
        (RuntimeError, "linear_weight of 1000 classes", (x, w, softce.LinearTeacher(x, w[:9])), {}),
        (ValueError, "batch_size", (x, w, softce.Teacher(prob[:3])), {}),
        (RuntimeError, "target dtype to be Long or Byte", (x, w, index.float()), {}),
        (RuntimeError, "row_weight on the input's device", (x, w, index), {"row_weight": one.to("meta")}),
        (RuntimeError, "row_weight must hold real numbers", (x, w, index), {"row_weight": one.to(torch.complex64)}),
        (TypeError, "row_loss must be a row loss or a callable, not int", (x, w, index), {"row_loss": 3}),
        (TypeError, "loss_dtype must be", (x, w, index), {"loss_dtype": torch.int32}),
        (TypeError, "ignore_index must be int, not str", (x, w, index), {"ignore_index": "a"}),
        # K-dimensional logits, which are computed as a whole, but not before what can be checked is
        (ValueError, "batch_size", (x, planes, index[:3, None]), {}),
        (IndexError, "value 600 in row 0", (x, planes, index[:, None].expand(N, 2) * 0 + 600), {}),
        (RuntimeError, "weight tensor should be defined", (x, planes, pair), {"weight": torch.ones(3)}),
        (ValueError, "row_weight must have shape", (x, planes, pair), {"row_weight": one}),
        (ValueError, "temperature", (x, planes, pair), {"temperature": -1.0}),
        (ValueError, "smoothing must be", (x, planes, pair), {"smoothing": "x"}),
        (IndexError, "value 600 in row 0", (x, planes, softce.Mixup(pair, pair * 0 + 600, 0.5)), {}),
        (ValueError, "one factor for each of 500", (x, planes, pair), {"row_loss": softce.Focal(alpha=one[:3])}),
        (RuntimeError, "'triton' cannot run", (x, planes, pair), {"options": Options(backend="triton")}),
    ]
    with (
        mock.patch("torch.mm", side_effect=AssertionError("computed")),
        mock.patch("torch.nn.functional.linear", side_effect=AssertionError("computed")),
    ):
        for error, message, args, kwargs in cases:
            with pytest.raises(error, match=message):
                softce.linear_cross_entropy(*args, **kwargs)
        with pytest.raises(ValueError, match="temperature must be positive"):
            softce.LinearTeacher(x, w, temperature=0.0)
        with pytest.raises(RuntimeError, match="in_features"):
            softce.LinearTeacher(x, w[:, :3])
        with pytest.raises(ValueError, match="one row"):
            softce.plan(x, w, options=Options(memory_budget=100))
        with pytest.raises(ValueError, match="valid value for reduction"):
            softce.plan(x, w, index, reduction="avg")
        with pytest.raises(RuntimeError, match=r"index of dtype torch\.int64, got torch\.int32"):
            softce.linear_logprobs(x, w, index.int())
        with pytest.raises(RuntimeError, match=r"\(V, H\)"):
            softce.plan(x, w.view(V // 2, 2, H))


@pytest.mark.parametrize("shape", [(5,), (5, 1), ()])
def test_no_features(shape: tuple[int, ...]) -> None:
    """H = 0: every class is as likely as another."""
    x, w = torch.randn(*shape, 0, requires_grad=True), torch.randn(4, 0, requires_grad=True)
    loss = softce.linear_cross_entropy(x, w, torch.zeros(shape, dtype=torch.int64), reduction="none")
    torch.testing.assert_close(loss.detach(), torch.full(shape, 4.0).log())
    loss.sum().backward()
    assert x.grad is not None and x.grad.shape == x.shape


# ---- module ----


def test_module_is_torchs() -> None:
    x, target = torch.randn(N, H), torch.randint(V, (N,))
    weight = torch.rand(V)
    ours = softce.LinearCrossEntropyLoss(H, V, bias=True, weight=weight, ignore_index=3, label_smoothing=0.1)
    want = softce.linear_cross_entropy(
        x, ours.linear.weight, target, linear_bias=ours.linear.bias, weight=weight, ignore_index=3, label_smoothing=0.1
    )
    torch.testing.assert_close(ours(x, target), want)
    assert set(ours.state_dict()) == {"weight", "linear.weight", "linear.bias"}
    ours.reduction = "none"
    assert ours(x, target).shape == (N,)
    if not hasattr(torch.nn, "LinearCrossEntropyLoss"):
        return
    for outputs, rows in (((), (N,)), ((3, 2), (N, 3, 2))):
        ours = softce.LinearCrossEntropyLoss(H, 7, out_features=outputs, bias=True, dtype=torch.float64)
        theirs = torch.nn.LinearCrossEntropyLoss(H, 7, out_features=outputs, bias=True, dtype=torch.float64)
        theirs.load_state_dict(ours.state_dict())
        index = torch.randint(7, rows)
        torch.testing.assert_close(ours(x.double(), index), theirs(x.double(), index))
        assert repr(ours.linear) == repr(theirs.linear)


def test_module_takes_the_functions_arguments() -> None:
    x, target = torch.randn(2, 5, H), torch.randint(V, (2, 5))
    module = softce.LinearCrossEntropyLoss(H, V, shift=True, softcap=4.0, options=Options(memory_budget=8 * V))
    row_weight = torch.rand(2, 5)
    want = softce.linear_cross_entropy(x, module.linear.weight, target, shift=True, softcap=4.0, row_weight=row_weight)
    torch.testing.assert_close(module(x, target, row_weight=row_weight), want)
    assert "softcap=4.0" in repr(module) and "shift=True" in repr(module) and "z_loss" not in repr(module)
    with pytest.raises(TypeError, match="unexpected keyword argument 'shfit'"):
        softce.LinearCrossEntropyLoss(H, V, shfit=True)
    with pytest.raises(RuntimeError, match="expected weight shape"):
        softce.LinearCrossEntropyLoss(H, V, weight=torch.ones(3))
    with pytest.raises(RuntimeError, match="label_smoothing"):
        softce.LinearCrossEntropyLoss(H, V, label_smoothing=-0.1)

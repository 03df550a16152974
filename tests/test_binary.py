# SPDX-License-Identifier: BSD-3-Clause
"""Binary cross-entropy with logits against torch's in float64: values, gradients, weights, edges, bad input."""

from __future__ import annotations

import math
import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from checks import kernel_calls, threads
from torch import Tensor

import softce
from softce import _library
from softce.binary import binary_cross_entropy_with_logits as bce

EPS = {torch.float64: 2.3e-16, torch.float32: 1.2e-7, torch.bfloat16: 7.9e-3, torch.float16: 9.8e-4}
SHAPES = ((), (1,), (7,), (6, 5), (33, 1000), (2, 3, 4, 5), (3, 40_000))
WEIGHTS = ("none", "scalar", "last", "rows", "full", "middle")


def _weight(kind: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor | None:
    if kind == "none":
        return None
    if kind == "scalar" or not shape:
        return torch.tensor(0.7, dtype=dtype)
    wanted = {
        "last": shape[-1:],
        "rows": (*shape[:1], *(1,) * (len(shape) - 1)),
        "full": shape,
        "middle": (shape[1], *(1,) * (len(shape) - 2)) if len(shape) > 2 else shape[-1:],
    }[kind]
    return (torch.rand(wanted) + 0.2).to(dtype)


def _inputs(shape: tuple[int, ...], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    x = (6 * torch.randn(shape)).to(dtype)
    t = torch.rand(shape).to(dtype)
    if x.numel() > 4:
        x.view(-1)[:3] = torch.tensor([0.0, 60.0, -60.0])
        t.view(-1)[1:4] = torch.tensor([1.0, 0.0, 1.0])
    return x, t


def _wide(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.double()


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", SHAPES)
def test_equals_torch(shape: tuple[int, ...], dtype: torch.dtype, reduction: str, options: softce.Options) -> None:
    x, t = _inputs(shape, dtype)
    for kind in WEIGHTS:
        w, v = _weight(kind, shape, dtype), _weight(kind, shape, dtype)
        leaf, wide = x.clone().requires_grad_(), x.double().requires_grad_()
        loss = bce(leaf, t, w, reduction=reduction, pos_weight=v, options=options)
        want = F.binary_cross_entropy_with_logits(wide, t.double(), _wide(w), pos_weight=_wide(v), reduction=reduction)
        assert loss.dtype == dtype and loss.shape == want.shape
        grad, want_grad = torch.autograd.grad(loss.sum(), leaf)[0], torch.autograd.grad(want.sum(), wide)[0]
        if dtype == torch.float16 and want.abs().max() > 65504:
            assert loss.isinf().any()
            continue
        eps, acc = EPS[dtype], max(EPS[torch.float32] if dtype != torch.float64 else 0, 2.3e-16)
        for got, exact in ((loss, want), (grad, want_grad)):
            scale = exact.detach().abs()
            allowed = 0.51 * eps * scale + 20 * acc * scale.max() + (6e-8 if dtype == torch.float16 else 0)
            assert bool(((got.double() - exact).abs() <= allowed).all()), (kind, (got.double() - exact).abs().max())


@pytest.mark.parametrize("smoothing", [0.1, 1.0])
def test_label_smoothing_moves_towards_one_half(smoothing: float, options: softce.Options) -> None:
    x, t = _inputs((6, 5), torch.float64)
    v = torch.rand(5, dtype=torch.float64)
    for reduction in ("mean", "none"):
        loss = bce(x, t, reduction=reduction, pos_weight=v, label_smoothing=smoothing, options=options)
        smoothed = (1 - smoothing) * t + smoothing / 2
        want = F.binary_cross_entropy_with_logits(x, smoothed, reduction=reduction, pos_weight=v)
        torch.testing.assert_close(loss, want)


def test_small_gradients_keep_their_digits(options: softce.Options) -> None:
    """At the sure end the gradient is e^-|x|, not a difference of two ones; and so is the loss."""
    x = torch.tensor([-30.0, -18.0, 18.0, 30.0], requires_grad=True)
    loss = bce(x, torch.tensor([0.0, 0.0, 1.0, 1.0]), reduction="sum", options=options)
    (grad,) = torch.autograd.grad(loss, x)
    want = torch.tensor([1.0, 1.0, -1.0, -1.0]).double() * torch.exp(-x.detach().double().abs())
    torch.testing.assert_close(grad.double(), want, rtol=2e-6, atol=0)
    torch.testing.assert_close(loss.double(), want.abs().sum(), rtol=2e-6, atol=0)


def test_layouts_and_mixed_dtypes(options: softce.Options) -> None:
    x, t = torch.randn(6, 8, 5), torch.rand(6, 8, 5)
    w = torch.rand(8, 1)
    want = F.binary_cross_entropy_with_logits(x, t, w)
    for layout in (lambda z: z.permute(2, 0, 1).contiguous().permute(1, 2, 0), lambda z: z.expand(6, 8, 5)):
        leaf = layout(x).detach().requires_grad_()
        loss = bce(leaf, layout(t), w, options=options)
        torch.testing.assert_close(loss, want)
        loss.backward()
        assert leaf.grad is not None and leaf.grad.shape == x.shape
    half = x.bfloat16()
    mixed = bce(half, t, w, options=options)
    assert mixed.dtype == torch.float32
    torch.testing.assert_close(mixed, F.binary_cross_entropy_with_logits(half.float(), t, w))
    wide = bce(x, t.double(), options=options)
    assert wide.dtype == torch.float64
    torch.testing.assert_close(wide, F.binary_cross_entropy_with_logits(x.double(), t.double()))
    assert bce(half, t.bfloat16(), loss_dtype=torch.float32, options=options).dtype == torch.float32


def test_the_kernel_runs_once_and_reads_once(cpu_kernels: None) -> None:
    x, t = torch.randn(300, 1000, requires_grad=True), torch.rand(300, 1000)
    with kernel_calls() as calls:
        bce(x, t, label_smoothing=0.1, pos_weight=torch.rand(1000)).backward()
    assert dict(calls) == {"binary_fused": 1}


def test_same_bits_on_every_run_thread_and_gradient_or_not(cpu_kernels: None) -> None:
    x, t = torch.randn(300, 1001), torch.rand(300, 1001)
    found = []
    for count in (1, 2, 3, 1):
        leaf = x.clone().requires_grad_()
        with threads(count):
            loss = bce(leaf, t)
            loss.backward()
        found.append((loss.detach(), leaf.grad))
    for loss, grad in found[1:]:
        assert torch.equal(loss, found[0][0]) and grad is not None and torch.equal(grad, found[0][1])
    assert torch.equal(bce(x, t), found[0][0])


def test_every_instruction_set(cpu_kernels: None) -> None:
    x, t = _inputs((3, 4099), torch.float32)
    w = torch.rand(4099)
    want = F.binary_cross_entropy_with_logits(x.double(), t.double(), w.double(), reduction="sum")
    before = _library.isa_chosen()
    try:
        for isa, usable in _library.isa_report().items():
            if usable != "usable":
                continue
            _library.isa_choose(isa)
            for dtype in (torch.float32, torch.bfloat16, torch.float64):
                leaf = x.to(dtype).requires_grad_()
                loss = bce(leaf, t.to(dtype), w.to(dtype), reduction="sum", loss_dtype=torch.float64)
                tolerance = 5e-3 if dtype == torch.bfloat16 else 1e-6
                torch.testing.assert_close(loss, want, rtol=tolerance, atol=0)
    finally:
        _library.isa_choose(before)


def test_gradcheck_and_second_derivatives(options: softce.Options) -> None:
    x, t, w, v = (torch.randn(4, 3, dtype=torch.float64).abs().mul(0.3).requires_grad_() for _ in range(4))

    def loss(x: Tensor, t: Tensor, w: Tensor, v: Tensor) -> Tensor:
        return bce(x, t, w, pos_weight=v, label_smoothing=0.1, options=options)

    assert torch.autograd.gradcheck(loss, (x, t, w, v))
    assert torch.autograd.gradgradcheck(loss, (x, t, w, v))
    fixed = [z.detach() for z in (t, w, v)]
    assert torch.autograd.gradcheck(lambda x: loss(x, *fixed), (x,))
    assert torch.autograd.gradgradcheck(lambda x: loss(x, *fixed), (x,))


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_batched_gradients(reduction: str, options: softce.Options) -> None:
    x, t = torch.randn(4, 3, dtype=torch.float64, requires_grad=True), torch.rand(4, 3, dtype=torch.float64)
    upstream = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
    found = [
        torch.autograd.grad(f(x, t, reduction=reduction), x, upstream, is_grads_batched=True)[0]
        for f in (lambda x, t, **k: bce(x, t, options=options, **k), F.binary_cross_entropy_with_logits)
    ]
    torch.testing.assert_close(found[0], found[1])


def test_backward_twice_and_upstream_factors(options: softce.Options) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        x, t = _inputs((40, 30), dtype)
        leaf = x.requires_grad_()
        loss = bce(leaf, t, options=options)
        once = torch.autograd.grad(loss, leaf, retain_graph=True)[0]
        assert torch.equal(once, torch.autograd.grad(loss, leaf, retain_graph=True)[0])
        triple = torch.autograd.grad(3 * loss, leaf)[0]
        rounding = {"rtol": 8e-3, "atol": 0.0} if dtype == torch.bfloat16 else {"rtol": 1e-6, "atol": 1e-9}
        torch.testing.assert_close(triple, 3 * once, **rounding)


def test_transforms_and_compile() -> None:
    x, t = torch.randn(4, 5), torch.rand(4, 5)
    want = torch.func.grad(lambda x: F.binary_cross_entropy_with_logits(x, t))(x)
    torch.testing.assert_close(torch.func.grad(lambda x: bce(x, t))(x), want)
    per_row = torch.func.vmap(torch.func.grad(bce))(x, t)
    torch.testing.assert_close(per_row, 4 * want)
    torch._dynamo.reset()
    compiled = torch.compile(lambda x: bce(x, t, label_smoothing=0.1), fullgraph=True, backend="aot_eager")
    found = []
    for f in (compiled, lambda x: bce(x, t, label_smoothing=0.1)):
        leaf = x.clone().requires_grad_()
        loss = f(leaf)
        loss.backward()
        assert leaf.grad is not None
        found.append((loss.detach(), leaf.grad))
    torch.testing.assert_close(found[0], found[1])


def test_operator_is_well_formed(cpu_kernels: None) -> None:
    x, t = torch.randn(100), torch.rand(100)
    for w in (None, torch.rand(30)):
        for gradient in (True, False):
            args: tuple[Any, ...] = (x, t, w, w, [0.9, 0.05], 0.01, gradient)
            torch.library.opcheck(torch.ops.softce.binary_fused.default, args)


def test_edges(options: softce.Options) -> None:
    empty = torch.empty(0, 3, requires_grad=True)
    assert bce(empty, torch.empty(0, 3), options=options).isnan()
    assert bce(empty, torch.empty(0, 3), reduction="sum", options=options).item() == 0.0
    assert bce(empty, torch.empty(0, 3), reduction="none", options=options).shape == (0, 3)
    for value, t, want in ((math.inf, 0.0, math.inf), (-math.inf, 1.0, math.inf), (math.nan, 0.5, math.nan)):
        loss = bce(torch.full((3,), value), torch.full((3,), t), options=options).item()
        assert loss == want or (math.isnan(want) and math.isnan(loss))
    huge = torch.tensor([1e30, -1e30], requires_grad=True)
    loss = bce(huge, torch.tensor([0.0, 1.0]), reduction="sum", options=options)
    assert loss.item() == pytest.approx(2e30)
    assert torch.autograd.grad(loss, huge)[0].tolist() == [1.0, -1.0]


def test_module() -> None:
    x, t = torch.randn(4, 3), torch.rand(4, 3)
    w, v = torch.rand(3), torch.rand(3)
    module = softce.BCEWithLogitsLoss(w, reduction="sum", pos_weight=v, label_smoothing=0.2)
    want = F.binary_cross_entropy_with_logits(x, 0.8 * t + 0.1, w, pos_weight=v, reduction="sum")
    torch.testing.assert_close(module(x, t), want)
    assert set(module.state_dict()) == {"weight", "pos_weight"}
    module.reduction = "mean"
    torch.testing.assert_close(module(x, t), want / 12)
    assert isinstance(module, torch.nn.BCEWithLogitsLoss)


def test_integer_weights_and_numbers_on_the_cpu() -> None:
    x, t, w = torch.randn(4, 3), torch.rand(4, 3), torch.tensor([1, 2, 0])
    want = F.binary_cross_entropy_with_logits(x, t, w > 1, pos_weight=w)
    torch.testing.assert_close(bce(x, t, w > 1, pos_weight=w), want)
    assert bce(x.to("meta"), t.to("meta"), torch.tensor(2.0)).device.type == "meta"


def test_bad_arguments() -> None:
    x, t = torch.randn(4, 3), torch.rand(4, 3)
    with pytest.raises(ValueError, match="Target size"):
        bce(x, t[0])
    with pytest.raises(ValueError, match="reduction"):
        bce(x, t, reduction="average")
    with pytest.raises(RuntimeError, match=r"target.float\(\)"):
        bce(x, (t > 0.5).long())
    with pytest.raises(NotImplementedError, match="input must be floating point, got"):
        bce(x.long(), t)
    with pytest.raises(NotImplementedError, match="target must be a dense tensor"):
        bce(x, t.to_sparse())
    for where in ({"target": t.to("meta")}, {"weight": t.to("meta")}, {"pos_weight": torch.tensor(1.0, device="meta")}):
        with pytest.raises(RuntimeError, match=f"Expected {next(iter(where))} on the input's device cpu, got meta"):
            bce(x, **{"target": t, **where})
    for kwargs in ({"label_smoothing": "some"}, {"label_smoothing": None}, {"loss_dtype": torch.int64}, {"options": 1}):
        with pytest.raises(TypeError, match=next(iter(kwargs))):
            bce(x, t, **kwargs)
    with pytest.raises(RuntimeError, match="pos_weight must broadcast"):
        bce(x, t, pos_weight=torch.rand(4))
    with pytest.raises(RuntimeError, match="weight must broadcast"):
        bce(x, t, torch.rand(2, 4, 3))
    for bad_types in ((x, [0.5]), (x, t, 2.0), (2.0, t)):
        with pytest.raises(TypeError, match=r"must be Tensor, not (list|float)"):
            bce(*bad_types)
    for e in (-0.1, 1.1, math.nan):
        with pytest.raises(RuntimeError, match="label_smoothing"):
            bce(x, t, label_smoothing=e)
    for bad in (t - 1, t + 1, torch.full_like(t, math.nan)):
        with pytest.warns(UserWarning, match="positive class"):
            bce(x, bad)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        bce(x, t)
        bce(x, t - 1, options=softce.Options(validate=False))

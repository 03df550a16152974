# SPDX-License-Identifier: BSD-3-Clause
"""Target forms: each equals what it stands for, works through autograd and compilers, and refuses what it cannot be.

``test_cross_entropy.py`` holds every form against the oracle; here a form is held against another way to write it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import softce

OPTION_SETS: dict[str, dict[str, Any]] = {
    "plain": {},
    "smoothed": {"label_smoothing": 0.2},
    "others": {"label_smoothing": 0.2, "smoothing": "others"},
    "everything": {"label_smoothing": 0.1, "temperature": 1.7, "softcap": 5.0, "z_loss": 0.01},
    "sum": {"reduction": "sum"},
    "none": {"reduction": "none", "temperature": 0.5},
    "focal": {"row_loss": softce.Focal(1.5), "label_smoothing": 0.1},
}
SHAPES = ((4, 7), (3, 5, 2, 3), (6,))
CLASSES_LAST = "classes last in memory"


def _rows(shape: tuple[int, ...]) -> tuple[int, ...]:
    return () if len(shape) == 1 else (shape[0], *shape[2:])


def _logits(shape: tuple[int, ...]) -> Tensor:
    return 3 * torch.randn(shape, dtype=torch.float64)


def _one_hot(index: Tensor, input: Tensor) -> Tensor:
    """Float64 one-hot rows in the input's shape; zeros for -100."""
    dim = 1 if input.dim() > 1 else 0
    classes = input.shape[dim]
    hot = F.one_hot(index.clamp_min(0), classes).double() * (index >= 0).double().unsqueeze(-1)
    return hot.movedim(-1, dim) if input.dim() > 1 else hot


def _check(input: Tensor, form: Any, dense: Any, **kwargs: Any) -> None:
    """The same loss and gradient from both targets."""
    found = []
    for target in (form, dense):
        x = input.detach().clone().requires_grad_()
        loss = softce.cross_entropy(x, target, **kwargs)
        (grad,) = torch.autograd.grad(loss.sum(), x)
        found.append((loss.detach(), grad))
    torch.testing.assert_close(found[0][0], found[1][0], rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(found[0][1], found[1][1], rtol=1e-11, atol=1e-13)


def _mixup(shape: tuple[int, ...], per: str = "sample") -> softce.Mixup:
    rows, classes = _rows(shape), shape[0 if len(shape) == 1 else 1]
    lam = {
        "number": 0.3,
        "sample": torch.rand(rows[:1], dtype=torch.float64),
        "row": torch.rand(rows, dtype=torch.float64),
    }[per]
    return softce.Mixup(torch.randint(classes, rows), torch.randint(classes, rows), lam)


def _mixup_dense(form: softce.Mixup, input: Tensor) -> Tensor:
    lam = torch.as_tensor(form.lam, dtype=torch.float64)
    rows = _rows(tuple(input.shape))
    lam = lam.reshape(lam.shape + (1,) * (len(rows) - lam.dim())).expand(rows)
    lam = lam.unsqueeze(1) if input.dim() > 1 else lam
    return lam * _one_hot(form.target_a, input) + (1 - lam) * _one_hot(form.target_b, input)


def _top_k(shape: tuple[int, ...], rest: str, log: bool = False) -> tuple[softce.TopK, Tensor]:
    """With a repeated class and padding, and the dense probabilities that it stands for."""
    rows, classes = _rows(shape), shape[0 if len(shape) == 1 else 1]
    index = torch.rand((*rows, classes)).argsort(-1)[..., :4].contiguous()
    prob = 0.2 * torch.rand((*rows, 4), dtype=torch.float64) + 0.01
    index[..., 1] = index[..., 0]
    index[..., 3] = -1
    dense = torch.zeros((*rows, classes), dtype=torch.float64).scatter_add(-1, index.clamp_min(0), prob * (index >= 0))
    if rest == "renormalize":
        dense = dense / dense.sum(-1, keepdim=True)
    elif rest == "uniform":
        free = dense == 0
        dense = torch.where(free, (1 - dense.sum(-1, keepdim=True)) / free.sum(-1, keepdim=True), dense)
    prob = torch.where(index < 0, torch.nan, prob.log() if log else prob)  # what stands beside padding is not used
    return softce.TopK(index, prob, rest, log), dense.movedim(-1, 1) if len(shape) > 1 else dense


@pytest.mark.parametrize("name", OPTION_SETS)
@pytest.mark.parametrize("shape", SHAPES)
def test_forms_equal_dense_probabilities(shape: tuple[int, ...], name: str, options: softce.Options) -> None:
    kwargs = {**OPTION_SETS[name], "options": options}
    input = _logits(shape)
    weight = torch.rand(shape[0 if len(shape) == 1 else 1], dtype=torch.float64) + 0.1
    for w in (None, weight):
        for per in ("number", "sample", "row"):
            form = _mixup(shape, per)
            _check(input, form, _mixup_dense(form, input), weight=w, **kwargs)
        for rest in ("zero", "uniform", "renormalize"):
            _check(input, *_top_k(shape, rest), weight=w, **kwargs)
        _check(input, *_top_k(shape, "zero", log=True), weight=w, **kwargs)
        teacher = _logits(shape)
        soft = torch.softmax(teacher / 2.5, 1 if len(shape) > 1 else 0)
        _check(input, softce.Teacher(teacher, 2.5), soft, weight=w, **kwargs)


@pytest.mark.parametrize("layout", ["contiguous", CLASSES_LAST])
def test_forms_with_row_weights_and_layouts(layout: str, options: softce.Options) -> None:
    for shape in ((4, 7), (3, 5, 2, 3)):
        input, rows = _logits(shape), torch.rand(_rows(shape), dtype=torch.float64)
        if layout == CLASSES_LAST:
            input = input.movedim(1, -1).contiguous().movedim(-1, 1) if len(shape) > 2 else input.t().contiguous().t()
        form = _mixup(shape)
        _check(input, form, _mixup_dense(form, input), row_weight=rows, options=options)
        _check(input, *_top_k(shape, "uniform"), row_weight=rows, options=options)
        teacher = _logits(shape)
        _check(input, softce.Teacher(teacher), torch.softmax(teacher, 1), row_weight=rows, options=options)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_mixup_is_the_weighted_pair_of_losses(reduction: str, options: softce.Options) -> None:
    input, a, b = _logits((6, 9)), torch.randint(9, (6,)), torch.randint(9, (6,))
    weight = torch.rand(9, dtype=torch.float64)
    for kwargs in ({}, {"label_smoothing": 0.1, "temperature": 2.0}):
        loss = softce.cross_entropy(input, softce.Mixup(a, b, 0.3), reduction=reduction, options=options, **kwargs)
        pair = [softce.cross_entropy(input, t, reduction=reduction, options=options, **kwargs) for t in (a, b)]
        torch.testing.assert_close(loss, 0.3 * pair[0] + 0.7 * pair[1])
    # With class weights a pair is soft: a mean divides by the rows, as for probabilities.
    loss = softce.cross_entropy(input, softce.Mixup(a, b, 0.3), weight, options=options)
    pair = [F.cross_entropy(input, t, weight, reduction="sum") for t in (a, b)]
    torch.testing.assert_close(loss, (0.3 * pair[0] + 0.7 * pair[1]) / 6)


def test_mixup_ignored_entries(options: softce.Options) -> None:
    input = _logits((4, 5))
    a, b = torch.tensor([1, -100, 2, -100]), torch.tensor([3, 4, -100, -100])
    loss = softce.cross_entropy(input, softce.Mixup(a, b, 0.25), reduction="none", options=options)
    logp = F.log_softmax(input, 1)
    want = torch.stack(
        [-0.25 * logp[0, 1] - 0.75 * logp[0, 3], -0.75 * logp[1, 4], -0.25 * logp[2, 2], torch.zeros(()).double()]
    )
    torch.testing.assert_close(loss, want)
    mean = softce.cross_entropy(input, softce.Mixup(a, b, 0.25), options=options)
    torch.testing.assert_close(mean, want.sum() / 3)


def test_teacher_scaling_and_divergence(options: softce.Options) -> None:
    input, teacher = _logits((4, 7)), _logits((4, 7))
    soft, logp = torch.softmax(teacher / 3, 1), F.log_softmax(input / 3, 1)
    kwargs: dict[str, Any] = {"temperature": 3.0, "options": options}
    want = F.kl_div(logp, soft, reduction="batchmean")
    for extra in ({}, {"row_loss": softce.Poly1(0.0)}):
        loss = softce.cross_entropy(input, softce.Teacher(teacher, 3.0, divergence=True), **kwargs, **extra)
        torch.testing.assert_close(loss, want)
    x = input.clone().requires_grad_()
    loss = softce.cross_entropy(x, softce.Teacher(teacher, 3.0, scale_loss=True, divergence=True), **kwargs)
    torch.testing.assert_close(loss.detach(), 9 * want)
    (grad,) = torch.autograd.grad(loss, x)
    torch.testing.assert_close(grad, 9 * (torch.softmax(input / 3, 1) - soft) / 3 / 4)
    self_divergence = softce.cross_entropy(input, softce.Teacher(input, divergence=True), options=options)
    assert abs(self_divergence.item()) < 1e-14


FORMS: dict[str, Callable[[tuple[int, ...]], Any]] = {
    "mixup": lambda shape: _mixup(shape),
    "topk": lambda shape: _top_k(shape, "uniform")[0],
    "teacher": lambda shape: softce.Teacher(_logits(shape), 2.0),
    "teacher_kl": lambda shape: softce.Teacher(_logits(shape), 2.0, divergence=True),
}


@pytest.mark.parametrize("form", FORMS)
def test_gradcheck(form: str, options: softce.Options) -> None:
    target = FORMS[form]((3, 5))
    x = _logits((3, 5)).requires_grad_()

    def loss(x: Tensor) -> Tensor:
        out = softce.cross_entropy(x, target, label_smoothing=0.1, row_loss=softce.Focal(2.0), options=options)
        assert isinstance(out, Tensor)
        return out

    assert torch.autograd.gradcheck(loss, (x,))
    assert torch.autograd.gradgradcheck(loss, (x,))


def test_gradcheck_for_the_targets(options: softce.Options) -> None:
    """Teacher logits, top-k probabilities and mixing weights may want a gradient too."""
    x, teacher = _logits((3, 5)).requires_grad_(), _logits((3, 5)).requires_grad_()
    prob = (0.1 + 0.2 * torch.rand(3, 2, dtype=torch.float64)).requires_grad_()
    lam = (0.2 + 0.5 * torch.rand(3, dtype=torch.float64)).requires_grad_()
    index, a, b = torch.tensor([[0, 1], [2, 2], [4, -1]]), torch.tensor([0, 1, 2]), torch.tensor([2, 1, 0])

    def ce(target: Any) -> Tensor:
        loss = softce.cross_entropy(x, target, options=options)
        assert isinstance(loss, Tensor)
        return loss

    assert torch.autograd.gradcheck(lambda _, t: ce(softce.Teacher(t, 2.0)), (x, teacher))
    assert torch.autograd.gradcheck(lambda _, t: ce(softce.Teacher(t, 2.0, divergence=True)), (x, teacher))
    for rest in ("zero", "uniform", "renormalize"):
        assert torch.autograd.gradcheck(lambda _, p, rest=rest: ce(softce.TopK(index, p, rest)), (x, prob))
    assert torch.autograd.gradcheck(lambda _, w: ce(softce.Mixup(a, b, w)), (x, lam))


def test_top_k_sums_slightly_above_one_leave_no_negative_share() -> None:
    x = _logits((4, 6)).requires_grad_()
    index, prob = torch.tensor([[0, 1], [2, 3], [4, 5], [1, 0]]), torch.full((4, 2), 0.52, dtype=x.dtype)
    spread, bare = (
        torch.autograd.grad(softce.cross_entropy(x, softce.TopK(index, prob, rest)), x)[0]
        for rest in ("uniform", "zero")
    )
    assert torch.equal(spread, bare)


@pytest.mark.parametrize("form", FORMS)
def test_compile_without_a_break(form: str) -> None:
    target = FORMS[form]((4, 6))
    tensors = {k: v for k, v in vars(target).items() if isinstance(v, Tensor)}
    rest = {k: v for k, v in vars(target).items() if not isinstance(v, Tensor)}

    def loss(x: Tensor, tensors: dict[str, Tensor]) -> Tensor:
        out = softce.cross_entropy(x, type(target)(**tensors, **rest), label_smoothing=0.1)
        assert isinstance(out, Tensor)
        return out

    torch._dynamo.reset()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    found = []
    for f in (loss, compiled):
        x = _logits((4, 6)) if not found else found[0][1]
        leaf = x.detach().clone().requires_grad_()
        value = f(leaf, tensors)
        value.backward()
        assert leaf.grad is not None
        found.append((value.detach(), x, leaf.grad))
    torch.testing.assert_close(found[0][0], found[1][0])
    torch.testing.assert_close(found[0][2], found[1][2])


class _Sizes(TorchDispatchMode):
    """The number of elements of every tensor that an operator makes, except views."""

    def __init__(self) -> None:
        super().__init__()
        self.made: list[tuple[str, int]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        inputs = {a.untyped_storage().data_ptr() for a in args if isinstance(a, Tensor)}
        for o in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(o, Tensor) and o.untyped_storage().data_ptr() not in inputs:
                self.made.append((str(func), o.numel()))
        return out


@pytest.mark.parametrize("form", ["mixup", "topk", "teacher"])
def test_nothing_of_the_logits_size_but_the_gradient(form: str, cpu_kernels: None) -> None:
    shape = (64, 1000)
    x = torch.randn(shape, requires_grad=True)
    target: Any = {
        "mixup": softce.Mixup(torch.randint(1000, (64,)), torch.randint(1000, (64,)), 0.3),
        "topk": softce.TopK(torch.randint(1000, (64, 8)), torch.full((64, 8), 0.1), rest="uniform"),
        "teacher": softce.Teacher(torch.randn(shape), 2.0),
    }[form]
    with _Sizes() as sizes:
        softce.cross_entropy(x, target, label_smoothing=0.1).backward()
    large = [made for made in sizes.made if made[1] >= x.numel()]
    assert len(large) == 1 and large[0][0] in ("softce.row_fused.default", "softce.row_grad.default"), large

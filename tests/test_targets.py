# SPDX-License-Identifier: BSD-3-Clause
"""Target forms: each equals what it stands for, works through autograd and compilers, and refuses what it cannot be.

``test_cross_entropy.py`` holds every form against the oracle; here a form is held against another way to write it.
"""

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
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import softce
from softce import validate
from softce.integrations import mixup as from_mixup

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


# ---- bad input ----


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
    with pytest.raises(RuntimeError, match=r"Mixup.target_b .*regression"):
        softce.cross_entropy(x, softce.Mixup(a, a.float(), 0.5))
    with pytest.raises(ValueError, match=r"batch_size .*Mixup.target_b"):
        softce.cross_entropy(x, softce.Mixup(a, torch.tensor([0, 1, 2]), 0.5))


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
    for value in (-0.2, math.nan):
        with pytest.raises(ValueError, match=r"TopK: prob must hold probabilities.*log=True"):
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


# ---- mixup of other libraries ----


class _TimmLike:
    """What ``timm.data.Mixup`` does to labels, for where it is not installed."""

    def __init__(self, lam: Any, num_classes: int, label_smoothing: float) -> None:
        self.lam, self.num_classes, self.label_smoothing = lam, num_classes, label_smoothing

    def __call__(self, x: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        off = self.label_smoothing / self.num_classes
        y = F.one_hot(target, self.num_classes).float() * (1 - self.label_smoothing) + off
        return x, y * self.lam + y.flip(0) * (1 - self.lam)


class _TorchvisionLike(torch.nn.Module):
    """What ``torchvision.transforms.v2.MixUp`` does to labels."""

    def __init__(self, lam: float, num_classes: int | None) -> None:
        super().__init__()
        self.lam, self.num_classes = lam, num_classes

    def forward(self, x: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        if labels.dim() == 1:
            assert self.num_classes is not None
            labels = F.one_hot(labels, self.num_classes).float()
        elif self.num_classes is not None and labels.shape[-1] != self.num_classes:
            raise ValueError("2D labels must have num_classes columns")
        return x, labels.roll(1, 0) * (1 - self.lam) + labels * self.lam


@pytest.mark.parametrize("lam", [0.3, 0.8, 1.0, "per sample"])
def test_timm_mixup(lam: Any) -> None:
    lam = torch.rand(6, 1) if lam == "per sample" else lam
    transform = _TimmLike(lam, 5, 0.1)
    x, target, logits = torch.rand(6, 3, 4, 4), torch.tensor([0, 1, 2, 2, 3, 4]), torch.randn(6, 5)
    _, dense = transform(x, target)
    _, form = from_mixup.timm(transform, x, target)
    want = softce.cross_entropy(logits, dense)
    torch.testing.assert_close(softce.cross_entropy(logits, form, label_smoothing=0.1), want)
    torch.testing.assert_close(
        softce.cross_entropy(logits, from_mixup.from_dense(dense, 0.1), label_smoothing=0.1), want
    )
    assert (transform.num_classes, transform.label_smoothing) == (5, 0.1), "the caller's transform is left alone"


@pytest.mark.parametrize("lam", [0.3, 0.8, 1.0])
def test_torchvision_mixup(lam: float) -> None:
    transform = _TorchvisionLike(lam, 5)
    x, target, logits = torch.rand(4, 3, 4, 4), torch.tensor([0, 1, 1, 4]), torch.randn(4, 5)
    _, dense = transform(x, target)
    _, form = from_mixup.torchvision(transform, x, target)
    want = softce.cross_entropy(logits, dense)
    torch.testing.assert_close(softce.cross_entropy(logits, form), want)
    torch.testing.assert_close(softce.cross_entropy(logits, from_mixup.from_dense(dense)), want)
    assert transform.num_classes == 5


def test_mixup_by_permutation_and_bad_batches() -> None:
    target, order = torch.tensor([0, 1, 2, 3]), torch.tensor([2, 0, 3, 1])
    form = from_mixup.from_permutation(target, order, 0.4)
    assert torch.equal(form.target_b, target[order])
    with pytest.raises(ValueError, match="permutation"):
        from_mixup.from_permutation(target, order[:2], 0.4)
    with pytest.raises(ValueError, match="even"):
        from_mixup.timm(_TimmLike(0.5, 4, 0.0), torch.rand(3, 1), target[:3])
    with pytest.raises(ValueError, match="class indices"):
        from_mixup.torchvision(_TorchvisionLike(0.5, 4), torch.rand(3, 1), torch.rand(3, 4))
    with pytest.raises(ValueError, match="label_smoothing"):
        from_mixup.from_dense(torch.full((2, 10), 0.1))


@pytest.mark.parametrize("mode", ["batch", "elem", "pair"])
def test_timm_itself(mode: str) -> None:
    timm_data = pytest.importorskip("timm.data.mixup", exc_type=Exception)
    import numpy as np

    transform = timm_data.Mixup(mixup_alpha=1.0, cutmix_alpha=1.0, mode=mode, num_classes=7)
    x, target, logits = torch.rand(6, 3, 8, 8), torch.randint(7, (6,)), torch.randn(6, 7)
    np.random.seed(0)
    images, dense = transform(x.clone(), target)
    np.random.seed(0)
    ours, form = from_mixup.timm(transform, x.clone(), target)
    assert torch.equal(images, ours)
    loss = softce.cross_entropy(logits, form, label_smoothing=transform.label_smoothing)
    torch.testing.assert_close(loss, softce.cross_entropy(logits, dense))

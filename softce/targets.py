# SPDX-License-Identifier: BSD-3-Clause
"""Target forms. Each reduces to one of the two forms that kernels know, sparse or dense, and owns its checks.

A plain tensor target is class indices or class probabilities, told apart as in torch: probabilities have the input's
shape. The other forms are small public classes. To add one, write a class with ``check`` and ``kernel_form``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from numbers import Real
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .arguments import check_number, check_tensor
from .layout import Layout
from .ops import DENSE_LOGITS, DENSE_PROBS, KernelTarget
from .validate import (
    check_logits,
    check_probabilities,
    may_look,
    min_of,
    surely_finite_probabilities,
    surely_not_negative,
)


class Form(NamedTuple):
    """A target in kernel form, with what the loss needs to know besides."""

    target: KernelTarget
    dense_kind: int = DENSE_PROBS
    dense_temperature: float = 1.0
    ignore_index: int = -100
    scale: float = 1.0  # multiplies the loss
    divergence: bool = False  # subtract the target's entropy


class Target:
    """Base class of target forms."""

    def check(self, input: Tensor, ignore_index: int) -> None:
        """Raise for anything about shapes, dtypes or devices that the form cannot take with this ``input``."""
        raise NotImplementedError

    def check_values(self) -> None:
        """Warn about values that cannot have been meant, where looking at them is cheap (:mod:`softce.validate`)."""

    def dtype(self, input: Tensor) -> torch.dtype:
        """The dtype of the loss by torch's promotion."""
        return input.dtype

    def kernel_form(self, layout: Layout, acc: torch.dtype, logits_dtype: torch.dtype, ignore_index: int) -> Form:
        """The kernel form for logits in ``layout``."""
        raise NotImplementedError


def _row_shape(input: Tensor) -> tuple[int, ...]:
    return () if input.dim() == 1 else (input.shape[0], *input.shape[2:])


def _check_rows(name: str, input: Tensor, got: tuple[int, ...]) -> None:
    """``got``, a target's shape of one entry a row, against ``input``; the error types are torch's."""
    want = _row_shape(input)
    if got == want:
        return
    if input.dim() == 1:
        if got == (1,):
            return
        error = ValueError if len(got) == 1 else RuntimeError
        raise error(f"For 1D input, 1D target must have size 1, but got target size: {list(got)} ({name})")
    got_batch = got[0] if got else 0
    if input.shape[0] != got_batch:
        raise ValueError(
            f"Expected input batch_size ({input.shape[0]}) to match target batch_size ({got_batch}): {name} must have "
            f"shape {list(want)} for input of shape {list(input.shape)}, got {list(got)}"
        )
    raise RuntimeError(
        f"Expected target size {list(want)}, got {list(got)} ({name}, for input of shape {list(input.shape)})"
    )


def _check_device(name: str, input: Tensor, x: Tensor) -> None:
    if x.device != input.device:
        raise RuntimeError(f"Expected {name} on the input's device {input.device}, got {x.device}")


def _check_tensors(form: Target, *names: str) -> None:
    for name in names:
        check_tensor(f"{type(form).__name__}: {name}", getattr(form, name))


def _check_float(name: str, x: Tensor, what: str) -> None:
    if not x.is_floating_point():
        raise RuntimeError(f"Expected floating point type for {what}, got {x.dtype} ({name})")


def _check_indices(name: str, input: Tensor, index: Tensor) -> None:
    if input.dim() > 1 and index.shape[:1] != input.shape[:1]:
        _check_rows(name, input, tuple(index.shape))  # torch too looks at the batch size before the dtype
    if index.dtype != torch.int64 and index.dtype != torch.uint8:
        hint = ""
        if index.is_floating_point():
            hint = (
                f": class probabilities must have the input's shape {list(input.shape)}, got {list(index.shape)}; "
                "continuous regression targets are not classes, use a regression loss such as mse_loss for them"
            )
        raise RuntimeError(f"expected {name} dtype to be Long or Byte, but got {index.dtype}{hint}")
    _check_rows(name, input, tuple(index.shape))
    _check_device(name, input, index)


@dataclass(frozen=True, eq=False)
class ClassIndices(Target):
    """One class a row: int64 or uint8, ``()``, ``(N,)`` or ``(N, d1, ..)``; what a plain tensor target becomes."""

    index: Tensor

    def check(self, input: Tensor, ignore_index: int) -> None:
        _check_indices("target", input, self.index)

    def kernel_form(self, layout: Layout, acc: torch.dtype, logits_dtype: torch.dtype, ignore_index: int) -> Form:
        index = self.index
        if index.dtype is not torch.int64:
            index = index.to(torch.int64)
        index = index.contiguous().view(-1, 1)
        return Form(KernelTarget(index), ignore_index=ignore_index)


@dataclass(frozen=True, eq=False)
class ClassProbabilities(Target):
    """One weight a class and row, of the input's shape: what a plain floating-point target of that shape becomes.

    Rows need not sum to 1; nothing assumes it.
    """

    prob: Tensor

    def check(self, input: Tensor, ignore_index: int) -> None:
        if not self.prob.is_floating_point():
            raise RuntimeError(
                f"Expected floating point type for target with class probabilities, got {self.prob.dtype}: a target of "
                "the input's shape holds probabilities. For integer one-hot rows pass target.float(), or the class "
                "indices target.argmax(1)"
            )
        if self.prob.shape != input.shape:
            if self.prob.shape[:1] != input.shape[:1]:
                _check_rows("target", input, tuple(self.prob.shape))
            raise RuntimeError(
                f"Expected target size {list(input.shape)}, got {list(self.prob.shape)}: class probabilities must have "
                "the input's shape; continuous regression targets are not classes, use a regression loss for them"
            )
        if ignore_index >= 0:
            raise RuntimeError(
                f"ignore_index is not supported for floating point target, got ignore_index={ignore_index}"
            )
        _check_device("target", input, self.prob)

    def check_values(self) -> None:
        check_probabilities(self.prob)

    def dtype(self, input: Tensor) -> torch.dtype:
        return torch.promote_types(input.dtype, self.prob.dtype)

    def kernel_form(self, layout: Layout, acc: torch.dtype, logits_dtype: torch.dtype, ignore_index: int) -> Form:
        return Form(KernelTarget(dense=_dense(self.prob, layout, acc, logits_dtype)), ignore_index=ignore_index)


def _dense(x: Tensor, layout: Layout, acc: torch.dtype, logits_dtype: torch.dtype) -> Tensor:
    """``x`` in the layout, in a dtype that kernels read: the logits' or the accumulation dtype."""
    if x.dtype is not logits_dtype and x.dtype is not acc:
        x = x.to(acc)
    return layout.block(x)


_ROUNDING = 1e-3  # what low-precision probabilities may lie outside their range by rounding


@dataclass(frozen=True, eq=False)
class TopK(Target):
    """K teacher entries a row, ``t = sum_k prob_k * onehot(index_k)`` over what ``rest`` says of the other classes.

    Args:
        index: int64 ``(..., K)`` with the row shape of the input in front: ``(N, K)`` for ``(N, C)`` logits. -1 and
            ``ignore_index`` are padding; a row of padding alone is ignored. A class that stands twice adds up.
        prob: ``(..., K)`` probabilities, or log-probabilities with ``log=True``. What stands beside padding is unused.
        rest: ``"zero"``: the other classes have none. ``"uniform"``: ``1 - sum(prob)`` is spread evenly over the
            classes that are not listed. ``"renormalize"``: the entries are divided by their sum.
        log: ``prob`` holds log-probabilities.

    Errors: RuntimeError for dtypes, devices and spatial shapes, IndexError for a class out of range, ValueError for the
    batch size, for ``rest`` and, on CPU outside of graphs, for probabilities that are negative, nan or, with
    ``rest="uniform"``, sum to more than 1. The loss divides by the number of rows under ``mean``, as for probabilities.
    """

    index: Tensor
    prob: Tensor
    rest: str = "zero"
    log: bool = False

    def __post_init__(self) -> None:
        if self.rest not in ("zero", "uniform", "renormalize"):
            raise ValueError(f"TopK: rest must be 'zero', 'uniform' or 'renormalize', got {self.rest!r}")
        _check_tensors(self, "index", "prob")
        if self.index.dtype != torch.int64:
            raise RuntimeError(f"TopK: expected index of dtype torch.int64, got {self.index.dtype}")
        _check_float("TopK.prob", self.prob, "teacher probabilities")
        if self.index.shape != self.prob.shape or self.index.dim() == 0 or self.index.shape[-1] == 0:
            raise RuntimeError(
                f"TopK: expected index and prob of one shape (..., K) with K > 0, got {list(self.index.shape)} and "
                f"{list(self.prob.shape)}"
            )

    def check(self, input: Tensor, ignore_index: int) -> None:
        _check_rows("TopK.index without its last dimension", input, tuple(self.index.shape[:-1]))
        _check_device("TopK.index", input, self.index)
        _check_device("TopK.prob", input, self.prob)
        if may_look(self.prob) and self.prob.numel():
            self._check_prob(ignore_index)

    def _check_prob(self, ignore_index: int) -> None:
        if not self.log and surely_finite_probabilities(self.prob):
            return
        low, high = torch.aminmax(self.prob.detach())
        if self._possible(float(low), float(high)):
            return
        entries = self.prob.detach()[(self.index != -1) & (self.index != ignore_index)]
        if not entries.numel():
            return
        low, high = torch.aminmax(entries)
        if self._possible(float(low), float(high)):
            return
        want = "log-probabilities (log=True), none above 0" if self.log else "finite probabilities, none negative"
        hint = "" if self.log else "; pass log=True for log-probabilities"
        raise ValueError(f"TopK: prob must hold {want} and none nan, got values from {low:.4g} to {high:.4g}{hint}")

    def _possible(self, low: float, high: float) -> bool:
        return high <= _ROUNDING if self.log else low >= -_ROUNDING and high < math.inf

    def dtype(self, input: Tensor) -> torch.dtype:
        return torch.promote_types(input.dtype, self.prob.dtype)

    def kernel_form(self, layout: Layout, acc: torch.dtype, logits_dtype: torch.dtype, ignore_index: int) -> Form:
        k = self.index.shape[-1]
        index = self.index.reshape(-1, k)
        prob = self.prob.reshape(-1, k).to(acc)
        padding = None
        if ignore_index >= 0 or not surely_not_negative(self.index):
            index = torch.where(index == -1, ignore_index, index)
            padding = index == ignore_index
            prob = torch.where(padding, -torch.inf if self.log else 0.0, prob)
        prob = prob.exp() if self.log else prob
        rest = None
        if self.rest == "renormalize":
            total = prob.sum(1, keepdim=True)
            prob = prob / torch.where(total == 0, 1.0, total)
        elif self.rest == "uniform":
            left = 1 - prob.sum(1)
            # Low-precision probabilities may sum to a little more than 1 by rounding alone.
            if may_look(left) and left.numel() and min_of([left.detach()]) < -0.05:
                raise ValueError(
                    "TopK: rest='uniform' spreads 1 - sum(prob) over the other classes, but a row's prob sums to "
                    f"{1 - min_of([left.detach()]):.4g}; use rest='renormalize' or rest='zero'"
                )
            first = first_occurrence(index)
            first = first if padding is None else first & ~padding
            others = layout.classes - first.sum(1)
            # A sum above 1 leaves nothing to spread, rather than a negative share.
            rest = torch.where(others > 0, left.clamp_min(0) / others.clamp_min(1), 0.0).to(acc)
            prob = prob - rest[:, None] * first
        target = KernelTarget(index=index.contiguous(), value=prob.contiguous(), rest=rest)
        return Form(target, ignore_index=ignore_index)


def first_occurrence(index: Tensor) -> Tensor:
    """Bool ``(R, K)``: entries whose class does not stand earlier in the row."""
    ordered, order = torch.sort(index, dim=1, stable=True)
    fresh = torch.ones_like(ordered, dtype=torch.bool)
    fresh[:, 1:] = ordered[:, 1:] != ordered[:, :-1]
    return torch.zeros_like(fresh).scatter(1, order, fresh)


@dataclass(frozen=True, eq=False)
class Mixup(Target):
    """A pair of class-index targets, ``t = lam * onehot(target_a) + (1 - lam) * onehot(target_b)``.

    Args:
        target_a, target_b: class indices as ``cross_entropy`` takes them. An ignored entry adds nothing; a row with
            both ignored is ignored.
        lam: the share of ``target_a`` in [0, 1]: a number, a tensor with one value, one a sample ``(N,)`` or one a row.

    Source: Zhang et al., "mixup: Beyond Empirical Risk Minimization", ICLR 2018; CutMix (Yun et al., ICCV 2019) pairs
    are the same form. Errors: ValueError for ``lam`` out of range or of a wrong shape; else as for class indices.
    The loss divides by the number of rows under ``mean``, as for probabilities.
    """

    target_a: Tensor
    target_b: Tensor
    lam: float | Tensor

    def __post_init__(self) -> None:
        _check_tensors(self, "target_a", "target_b")
        if not isinstance(self.lam, Tensor):
            if not isinstance(self.lam, Real):
                raise TypeError(f"Mixup: lam must be a number or a Tensor, got {type(self.lam).__name__}")
            if not 0.0 <= self.lam <= 1.0:
                raise ValueError(f"Mixup: lam must be in [0, 1], got {self.lam}")
        elif self.lam.is_complex():
            raise RuntimeError(f"Mixup: lam must hold real numbers, got {self.lam.dtype}")
        elif may_look(self.lam) and self.lam.numel():
            low, high = (float(v) for v in torch.aminmax(self.lam.detach()))
            if not (low >= 0.0 and high <= 1.0):
                raise ValueError(f"Mixup: lam must be in [0, 1], got values from {low} to {high}")

    def check(self, input: Tensor, ignore_index: int) -> None:
        _check_indices("Mixup.target_a", input, self.target_a)
        _check_indices("Mixup.target_b", input, self.target_b)
        if isinstance(self.lam, Tensor) and self.lam.numel() != 1:
            shape, rows = tuple(self.lam.shape), _row_shape(input)
            if shape != rows and shape != rows[:1]:
                fitting = " or ".join(dict.fromkeys((str(list(rows[:1])), str(list(rows)))))
                raise ValueError(f"Mixup: lam must be a number or have shape {fitting}, got {list(shape)}")

    def kernel_form(self, layout: Layout, acc: torch.dtype, logits_dtype: torch.dtype, ignore_index: int) -> Form:
        a, b = (t.to(torch.int64).reshape(-1) for t in (self.target_a, self.target_b))
        index = torch.stack((a, b), 1)
        if isinstance(self.lam, Tensor):
            lam = self.lam.to(device=index.device, dtype=acc)
            if lam.numel() != 1:
                lam = lam.reshape(lam.shape + (1,) * (len(layout.row_shape) - lam.dim()))
                lam = lam.expand(layout.row_shape).reshape(-1)
            else:
                lam = lam.reshape(()).expand(a.shape)
            value = torch.stack((lam, 1 - lam), 1)
        else:
            # Times a tensor: a compiled graph then takes any number, where torch.tensor would make it a constant.
            one = torch.ones(a.shape, dtype=acc, device=index.device)
            value = torch.stack((one * self.lam, one * (1 - self.lam)), 1)
        return Form(KernelTarget(index=index, value=value), ignore_index=ignore_index)


@dataclass(frozen=True, eq=False)
class Teacher(Target):
    """Probabilities from teacher logits, ``t = softmax(logits / temperature)``, taken inside the kernel.

    Args:
        logits: the input's shape.
        temperature: of the teacher; the student's is ``cross_entropy``'s ``temperature``.
        scale_loss: multiply the loss by ``temperature ** 2``, so that gradients keep their size (Hinton et al.,
            "Distilling the Knowledge in a Neural Network", 2015).
        divergence: subtract the target's entropy: the loss is KL(t || p) instead of the cross-entropy. Its gradient
            for the student is the same.

    Errors: RuntimeError for shape, dtype or device, ValueError for a temperature that is not positive.
    """

    logits: Tensor
    temperature: float = 1.0
    scale_loss: bool = False
    divergence: bool = False

    def __post_init__(self) -> None:
        _check_tensors(self, "logits")
        check_number("Teacher: temperature", self.temperature)
        if not 0 < self.temperature < math.inf:
            raise ValueError(f"Teacher: temperature must be positive, got {self.temperature}")
        _check_float("Teacher.logits", self.logits, "teacher logits")

    def check(self, input: Tensor, ignore_index: int) -> None:
        if self.logits.shape != input.shape:
            error = ValueError if self.logits.shape[:1] != input.shape[:1] else RuntimeError
            raise error(
                f"Teacher: expected logits of the input's shape {list(input.shape)}, got {list(self.logits.shape)}"
            )
        _check_device("Teacher.logits", input, self.logits)

    def check_values(self) -> None:
        check_logits(self.logits, "Teacher.logits", "pass probabilities as a plain target, without Teacher")

    def dtype(self, input: Tensor) -> torch.dtype:
        return torch.promote_types(input.dtype, self.logits.dtype)

    def kernel_form(self, layout: Layout, acc: torch.dtype, logits_dtype: torch.dtype, ignore_index: int) -> Form:
        return Form(
            KernelTarget(dense=_dense(self.logits, layout, acc, logits_dtype)),
            DENSE_LOGITS,
            float(self.temperature),
            scale=self.temperature**2 if self.scale_loss else 1.0,
            divergence=self.divergence,
        )


def as_target(input: Tensor, target: Any) -> Target:
    """The target form of what the caller gave."""
    if isinstance(target, Tensor):
        check_tensor("cross_entropy: target", target)
        # The dimensions first: shapes of different lengths would be compared, and by tracers guarded, size by size.
        if target.dim() == input.dim() > 0 and target.shape == input.shape:
            return ClassProbabilities(target)
        if target.is_floating_point() and target.dim() == input.dim() > 1:
            return ClassProbabilities(target)  # raises for the shape that differs
        return ClassIndices(target)
    if isinstance(target, Target):
        return target
    raise TypeError(f"cross_entropy: target must be a Tensor or a softce target, not {type(target).__name__}")

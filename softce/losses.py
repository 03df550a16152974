# SPDX-License-Identifier: BSD-3-Clause
"""Losses under the names and with the arguments that the field knows them by, all on :func:`softce.cross_entropy`."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .arguments import check_number, check_tensor
from .functional import cross_entropy
from .layout import Layout
from .ops import acc_dtype
from .row_losses import LabelRelaxation
from .settings import check_dtype, check_input, default_loss_dtype
from .targets import ClassProbabilities, Form, Target, as_target
from .validate import check_logits

_KL_REDUCTIONS = ("batchmean", "mean", "sum", "row", "none")


@dataclass(frozen=True, eq=False)
class _Divergence(Target):
    """``of`` with its entropy subtracted from the loss, which is multiplied by ``scale``."""

    of: Target
    scale: float

    def check(self, input: Tensor, ignore_index: int) -> None:
        self.of.check(input, ignore_index)

    def check_values(self) -> None:
        self.of.check_values()

    def dtype(self, input: Tensor) -> torch.dtype:
        return self.of.dtype(input)

    def kernel_form(self, layout: Layout, acc: torch.dtype, logits_dtype: torch.dtype, ignore_index: int) -> Form:
        form = self.of.kernel_form(layout, acc, logits_dtype, ignore_index)
        return form._replace(divergence=True, scale=form.scale * self.scale)


def kl_div_loss(
    input: Tensor,
    target: Tensor | Target,
    weight: Tensor | None = None,
    reduction: str = "batchmean",
    *,
    log_target: bool = False,
    **arguments: Any,
) -> Tensor:
    """Kullback-Leibler divergence ``KL(t || softmax(input))`` from logits, with a target in any form.

    ``sum_c t_c (log t_c - log p_c)`` a row with ``0 log 0 = 0``. With class ``weight`` each class's term is multiplied
    by its weight; with ``label_smoothing`` the divergence is from the smoothed target. The gradient is the
    cross-entropy's, from the same single pass.

    Args:
        input: logits ``(C,)``, ``(N, C)`` or ``(N, C, d1, ..)``.
        target: class probabilities of the input's shape, class indices, or a form of :mod:`softce.targets`.
        weight: ``(C,)`` class weights.
        reduction: as in ``torch.nn.functional.kl_div``, which takes log-probabilities: ``"batchmean"`` divides the sum
            by the input's first dimension (``(C,)`` is one row: by 1), ``"mean"`` by its number of elements, ``"none"``
            gives every class's term, ``(N, C, ..)``. ``"row"`` gives one value a row, ``(N, ..)``.
        log_target: ``target`` holds log-probabilities.
        arguments: keyword arguments of :func:`softce.cross_entropy`.

    Errors: those of :func:`softce.cross_entropy`; ValueError for a bad ``reduction``; TypeError for ``return_stats``.
    """
    if reduction not in _KL_REDUCTIONS:
        raise ValueError(f"kl_div_loss: reduction must be one of {', '.join(_KL_REDUCTIONS)}, got {reduction!r}")
    if arguments.pop("return_stats", False):
        raise TypeError("kl_div_loss: return_stats is not available here; call softce.cross_entropy for statistics")
    check_input("kl_div_loss", input)
    if log_target:
        if not isinstance(target, Tensor):
            raise TypeError(f"kl_div_loss: log_target needs a Tensor target, got {type(target).__name__}")
        target = target.exp()
    if reduction == "none":
        if not isinstance(target, Tensor) or target.shape != input.shape or weight is not None or arguments:
            raise ValueError(
                "kl_div_loss: reduction='none' gives every class's term and takes class probabilities alone; "
                "use reduction='row' with other targets and arguments"
            )
        form = ClassProbabilities(target)
        form.check(input, -100)
        check_dtype("kl_div_loss", input)
        check_logits(input)
        form.check_values()
        dtype = form.dtype(input)
        acc = acc_dtype(dtype)
        logp = torch.log_softmax(input.to(acc), 1 if input.dim() > 1 else 0)
        each = nn.functional.kl_div(logp, target.to(acc), reduction="none")
        return each.to(default_loss_dtype(dtype, input.device.type))
    count = 1
    if reduction == "batchmean" and input.dim() > 1:
        count = input.shape[0]
    elif reduction == "mean":
        count = input.numel()
    # Of nothing the sum is 0, and dividing it by 0 gives nan unless the caller wants 0.
    scale = 1.0 / count if count else 1.0 if arguments.get("empty") == "zero" else math.nan
    if torch.compiler.is_compiling() and count:  # a scalar of the call is a constant of the graph: not for every size
        scale, given = 1.0, arguments.get("row_weight")
        rows = input.shape[:1] + input.shape[2:] if input.dim() > 1 else ()
        each = torch.ones(rows, dtype=torch.float64, device=input.device) if given is None else given
        arguments["row_weight"] = each / count
    loss = cross_entropy(
        input,
        _Divergence(as_target(input, target), scale),
        weight,
        reduction="none" if reduction == "row" else "sum",
        **arguments,
    )
    assert isinstance(loss, Tensor)
    return loss


def _mean(input: Tensor, target: Tensor | Target, dim: int, **arguments: Any) -> Tensor:
    """The mean cross-entropy with the classes of ``input`` (and of a dense target) in dimension ``dim``."""
    check_tensor("pred", input)
    if not -input.dim() <= dim < input.dim():
        raise IndexError(f"dim must be in [{-input.dim()}, {input.dim() - 1}] for shape {list(input.shape)}, got {dim}")
    if isinstance(target, Tensor) and target.shape == input.shape:
        target = target if target.is_floating_point() else target.to(input.dtype)  # an integer one-hot
        target = target.movedim(dim, 1) if input.dim() > 1 else target
    loss = cross_entropy(input.movedim(dim, 1) if input.dim() > 1 else input, target, **arguments)
    assert isinstance(loss, Tensor)
    return loss


class LabelSmoothingLossCanonical(nn.Module):
    """Mean cross-entropy with canonical label smoothing, ``t = (1 - smoothing) * onehot + smoothing / C``.

    Args:
        smoothing: in [0, 1].
        dim: the class dimension of ``pred``.

    Shapes: ``pred`` logits with the classes in ``dim``; ``target`` class indices of the shape without ``dim``, or
    probabilities of ``pred``'s shape.

    Source: Szegedy et al., "Rethinking the Inception Architecture for Computer Vision", CVPR 2016. Errors: those of
    :func:`softce.cross_entropy`; ValueError for ``smoothing`` out of range.
    """

    def __init__(self, smoothing: float = 0.0, dim: int = -1) -> None:
        super().__init__()
        _check_unit("LabelSmoothingLossCanonical", "smoothing", smoothing)
        self.smoothing, self.dim = smoothing, dim

    def forward(self, pred: Tensor, target: Tensor) -> Tensor:
        """The mean loss of ``pred`` against ``target``."""
        return _mean(pred, target, self.dim, label_smoothing=self.smoothing)


class LabelRelaxationLoss(nn.Module):
    """Mean label relaxation: 0 where ``p_y > 1 - alpha``, else the divergence from the relaxed target.

    Args:
        alpha: in [0, 1); 0 is the plain cross-entropy.
        dim: the class dimension of ``pred``.
        logits_provided: ``pred`` holds logits; else probabilities.
        one_hot_encode_trgts: ``target`` holds class indices; else one-hot rows of ``pred``'s shape. Class indices are
            told apart by their shape and taken either way.
        num_classes: the number of classes of the one-hot encoding, -1 for ``pred``'s; any other number than ``pred``'s
            is an error. No one-hot rows are made of class indices.

    Source: Lienen and Huellermeier, "From Label Smoothing to Label Relaxation", AAAI 2021. Errors: those of
    :func:`softce.cross_entropy`; ValueError for ``alpha`` out of range or ``num_classes`` that differs.
    """

    def __init__(
        self,
        alpha: float = 0.1,
        dim: int = -1,
        logits_provided: bool = True,
        one_hot_encode_trgts: bool = False,
        num_classes: int = -1,
    ) -> None:
        super().__init__()
        LabelRelaxation(alpha)
        self.alpha, self.dim, self.logits_provided = alpha, dim, logits_provided
        self.one_hot_encode_trgts, self.num_classes = one_hot_encode_trgts, num_classes

    def forward(self, pred: Tensor, target: Tensor) -> Tensor:
        """The mean loss of ``pred`` against ``target``."""
        if self.one_hot_encode_trgts:
            classes = pred.shape[self.dim]
            if self.num_classes not in (-1, classes):
                raise ValueError(f"LabelRelaxationLoss: num_classes is {self.num_classes}, pred has {classes} classes")
            if target.shape == pred.shape:
                raise ValueError(
                    "LabelRelaxationLoss: one_hot_encode_trgts=True expects class indices, got a target of pred's "
                    f"shape {list(pred.shape)}"
                )
        row_loss = LabelRelaxation(self.alpha)
        return _mean(pred, target, self.dim, row_loss=row_loss, from_probs=not self.logits_provided)


class SoftTargetCrossEntropy(nn.Module):
    """Cross-entropy with class probabilities, averaged over rows: timm's loss of that name.

    Shapes: ``x`` logits ``(..., C)``, ``target`` the same.
    """

    def forward(self, x: Tensor, target: Tensor | Target) -> Tensor:
        """The mean loss of ``x`` against ``target``."""
        return _mean(x, target, -1)


class LabelSmoothingCrossEntropy(nn.Module):
    """Cross-entropy with class indices and label smoothing, averaged over rows: timm's loss of that name.

    Args:
        smoothing: in [0, 1].

    Shapes: ``x`` logits ``(N, C)``, ``target`` class indices ``(N,)``.
    """

    def __init__(self, smoothing: float = 0.1) -> None:
        super().__init__()
        _check_unit("LabelSmoothingCrossEntropy", "smoothing", smoothing)
        self.smoothing = smoothing

    def forward(self, x: Tensor, target: Tensor | Target) -> Tensor:
        """The mean loss of ``x`` against ``target``."""
        return _mean(x, target, -1, label_smoothing=self.smoothing)


def _check_unit(owner: str, name: str, value: float) -> None:
    check_number(f"{owner}: {name}", value)
    if not 0.0 <= value <= 1.0:
        raise ValueError(f"{owner}: {name} must be in [0, 1], got {value}")

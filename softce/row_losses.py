# SPDX-License-Identifier: BSD-3-Clause
"""Row losses: a scalar transform ``L = phi(l)`` of the row loss ``l``, so at no extra pass over the logits.

``l`` is the whole row loss of the call, with its class weights, smoothing and z-loss; for a one-hot target without them
``l = -log p_y`` and each transform is the loss of its paper. A row loss of your own is any callable that maps the
``(R,)`` tensor of row losses to one of the same shape with torch operations.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .arguments import check_number
from .ops import PHI_FOCAL, PHI_GENERALIZED, PHI_IDENTITY, PHI_LABEL_RELAXATION, PHI_POLY1, Spec
from .validate import may_look, min_of


class RowLoss:
    """Base class of the row losses that the kernels know: ``phi``, its number and its parameters."""

    phi: int
    factor: float = 1.0  # a constant in front of the kernel's phi
    class_factor: Tensor | None = None  # (C,): a factor of each row by its target, besides

    def parameters(self) -> tuple[float, float]:
        """The two parameters of ``phi`` in the kernels."""
        raise NotImplementedError

    def __call__(self, loss: Tensor) -> Tensor:
        """``phi(l)`` in plain PyTorch."""
        raise NotImplementedError

    def unscaled(self) -> RowLoss:
        """This row loss without its constant factor."""
        return self


def one_minus_exp(x: Tensor) -> Tensor:
    """``1 - e^-x`` whose value is accurate where it is small and whose derivative ``e^-x`` is where that is small.

    autograd takes the derivative of ``expm1`` from its result, which holds no digit of ``e^-x`` where that is tiny.
    """
    small = x < 0.5
    near = torch.where(small, x, 0.0)
    return torch.where(small, -torch.expm1(-near), 1.0 - torch.exp(-torch.where(small, 1.0, x)))


def _range(owner: str, name: str, value: float, fits: Callable[[float], bool], want: str) -> None:
    check_number(f"{owner}: {name}", value)
    if not fits(value):
        raise ValueError(f"{owner}: {name} must be {want}, got {value}")


@dataclass(frozen=True)
class Focal(RowLoss):
    """Focal loss ``alpha * (1 - e^-l)^gamma * l``; with ``l = -log p_y`` this is ``-alpha (1-p_y)^gamma log p_y``.

    Args:
        gamma: focusing exponent, >= 0; 0 is the plain loss.
        alpha: a constant factor, or one a class, ``(C,)``: a row is multiplied by ``alpha[y]`` for a class index and
            by ``sum_c alpha_c t_c`` for a soft target ``t`` (before smoothing). Unlike ``weight=`` and ``row_weight=``
            it is no part of what a mean divides by.

    Source: Lin et al., "Focal Loss for Dense Object Detection", ICCV 2017. Errors: ValueError out of range or for an
    ``alpha`` of another length than the classes.
    """

    gamma: float = 2.0
    alpha: float | Tensor = 1.0
    phi = PHI_FOCAL

    def __post_init__(self) -> None:
        _range("Focal", "gamma", self.gamma, lambda g: 0 <= g < math.inf, ">= 0")
        if not isinstance(self.alpha, Tensor):
            _range("Focal", "alpha", self.alpha, lambda a: 0 <= a < math.inf, ">= 0")
            return
        if self.alpha.dim() != 1 or not self.alpha.is_floating_point():
            raise ValueError(
                "Focal: alpha must be a number or a floating-point tensor of shape (C,), got "
                f"{self.alpha.dtype} of shape {list(self.alpha.shape)}"
            )
        if may_look(self.alpha) and self.alpha.numel() and not min_of([self.alpha.detach()]) >= 0:
            raise ValueError("Focal: alpha must be >= 0 for every class")

    def parameters(self) -> tuple[float, float]:
        return float(self.gamma), 0.0

    def unscaled(self) -> Focal:
        return Focal(self.gamma)

    @property
    def factor(self) -> float:  # type: ignore[override]
        return 1.0 if isinstance(self.alpha, Tensor) else float(self.alpha)

    @property
    def class_factor(self) -> Tensor | None:  # type: ignore[override]
        return self.alpha if isinstance(self.alpha, Tensor) else None

    def __call__(self, loss: Tensor) -> Tensor:
        if isinstance(self.alpha, Tensor):
            raise TypeError("Focal: alpha of shape (C,) needs the target; pass the row loss to softce.cross_entropy")
        if self.gamma == 0:
            return self.alpha * loss
        # Outside, phi is 0 or l itself. The formula must not see those values: 0^(gamma-1) and inf * 0 would reach
        # the gradient through autograd, whatever torch.where picks.
        none, endless = loss < torch.finfo(loss.dtype).tiny, loss == torch.inf
        safe = torch.where(none | endless, 1.0, loss)
        value = torch.where(none, 0.0 * loss, one_minus_exp(safe) ** self.gamma * safe)
        return self.alpha * torch.where(endless, loss, value)


@dataclass(frozen=True)
class LabelRelaxation(RowLoss):
    """Label relaxation: 0 where ``p_y > 1 - alpha``, else the divergence from the nearest distribution of the set.

    ``(1-alpha) * (log(1-alpha) + l) + alpha * (log alpha - log(1 - e^-l))`` with ``p_y = e^-l``; alpha = 0 is the
    plain loss.

    Args:
        alpha: imprecisiation in [0, 1).

    Source: Lienen and Huellermeier, "From Label Smoothing to Label Relaxation", AAAI 2021. Errors: ValueError.
    """

    alpha: float = 0.1
    phi = PHI_LABEL_RELAXATION

    def __post_init__(self) -> None:
        _range("LabelRelaxation", "alpha", self.alpha, lambda a: 0 <= a < 1, "in [0, 1)")

    def parameters(self) -> tuple[float, float]:
        return float(self.alpha), 0.0

    def __call__(self, loss: Tensor) -> Tensor:
        a = self.alpha
        if a == 0:
            return loss
        inside = loss < -math.log1p(-a)
        safe = torch.where(inside, 1.0, loss)
        value = (1 - a) * (math.log1p(-a) + safe) + a * (math.log(a) - torch.log(one_minus_exp(safe)))
        return torch.where(inside, 0.0 * loss, value)


@dataclass(frozen=True)
class GeneralizedCrossEntropy(RowLoss):
    """Generalized cross-entropy ``(1 - e^(-q l)) / q``; with ``l = -log p_y`` this is ``(1 - p_y^q) / q``.

    Args:
        q: in (0, 1]: towards 0 the plain loss, at 1 the mean absolute error.

    Source: Zhang and Sabuncu, "Generalized Cross Entropy Loss for Training Deep Neural Networks with Noisy Labels",
    NeurIPS 2018. Errors: ValueError.
    """

    q: float = 0.7
    phi = PHI_GENERALIZED

    def __post_init__(self) -> None:
        _range("GeneralizedCrossEntropy", "q", self.q, lambda q: 0 < q <= 1, "in (0, 1]")

    def parameters(self) -> tuple[float, float]:
        return float(self.q), 0.0

    def __call__(self, loss: Tensor) -> Tensor:
        return one_minus_exp(self.q * loss) / self.q


@dataclass(frozen=True)
class Poly1(RowLoss):
    """Poly-1 ``l + epsilon * (1 - e^-l)``; with ``l = -log p_y`` this is ``-log p_y + epsilon (1 - p_y)``.

    Args:
        epsilon: any finite number; 0 is the plain loss.

    Source: Leng et al., "PolyLoss: A Polynomial Expansion Perspective of Classification Loss Functions", ICLR 2022.
    Errors: ValueError.
    """

    epsilon: float = 1.0
    phi = PHI_POLY1

    def __post_init__(self) -> None:
        _range("Poly1", "epsilon", self.epsilon, lambda e: -math.inf < e < math.inf, "a finite number")

    def parameters(self) -> tuple[float, float]:
        return float(self.epsilon), 0.0

    def __call__(self, loss: Tensor) -> Tensor:
        return loss + self.epsilon * one_minus_exp(loss)


def phi_of(spec: Spec) -> RowLoss | None:
    """The row loss whose number and parameters stand in ``spec``, without its constant factor."""
    if spec.phi == PHI_IDENTITY:
        return None
    owner = {c.phi: c for c in (Focal, LabelRelaxation, GeneralizedCrossEntropy, Poly1)}[int(spec.phi)]
    return owner(spec.phi_p0)


def without_factor(row_loss: Callable[[Tensor], Tensor] | None) -> Callable[[Tensor], Tensor] | None:
    """``row_loss`` without its constant factor, which ``Spec.scale`` holds; a callable of the user's as it is."""
    return row_loss.unscaled() if isinstance(row_loss, RowLoss) else row_loss

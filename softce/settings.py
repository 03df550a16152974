# SPDX-License-Identifier: BSD-3-Clause
"""Arguments that every loss shares: their checks, the scalars made of them, and the statistics that may be returned."""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .arguments import check_number, check_tensor
from .ops import PHI_IDENTITY, Spec
from .options import Options
from .row_losses import RowLoss
from .targets import ClassIndices, Target

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def default_loss_dtype(promoted: torch.dtype, device: str) -> torch.dtype:
    """The dtype of a loss whose tensors promote to ``promoted``: that, or float32 for half precision under autocast."""
    autocast = promoted.itemsize == 2 and device != "meta" and torch.is_autocast_enabled(device)
    return torch.float32 if autocast else promoted


class Stats(NamedTuple):
    """Per-row facts from the same pass, each of the target's row shape; 0 where the row is ignored.

    Attributes:
        lse: ``logsumexp`` of the transformed logits ``y``.
        target_log_prob: ``sum_c t_c log p_c``, without class weights and smoothing; ``log p_y`` for class indices.
        entropy: ``-sum_c p_c log p_c`` in nats.
        correct: bool, whether the most likely class is the target's.
    """

    lse: Tensor
    target_log_prob: Tensor
    entropy: Tensor
    correct: Tensor


def make_spec(
    classes: int,
    label_smoothing: float,
    smoothing: str,
    temperature: float,
    softcap: float,
    z_loss: float,
    row_loss: RowLoss | None,
    dense_kind: int,
    dense_temperature: float,
    scale: float,
    empty: str,
) -> Spec:
    """The scalars of a call, checked."""
    for name, value in (("temperature", temperature), ("softcap", softcap), ("z_loss", z_loss)):
        check_number(f"cross_entropy: {name}", value)
    e = label_smoothing
    if e > 1.0:
        raise RuntimeError(f"label_smoothing must be between 0.0 and 1.0. Got: {e}")
    if not e >= 0.0:
        e = 0.0  # nan too, as torch does
    if smoothing not in ("uniform", "others"):
        raise ValueError(f"smoothing must be 'uniform' or 'others', got {smoothing!r}")
    if not 0.0 < temperature < math.inf:
        raise ValueError(f"temperature must be positive and finite, got {temperature}")
    if not 0.0 <= softcap < math.inf:
        raise ValueError(f"softcap must be positive and finite, or None or 0 for none, got {softcap}")
    if not 0.0 <= z_loss < math.inf:
        raise ValueError(f"z_loss must be finite and not negative, got {z_loss}")
    if empty not in ("nan", "zero"):
        raise ValueError(f"empty must be 'nan' or 'zero', got {empty!r}")
    if e == 0.0 or classes == 0:
        mix_a, mix_b = 1.0 - e, 0.0
    elif smoothing == "uniform":
        mix_a, mix_b = 1.0 - e, e / classes
    else:
        share = e / (classes - 1) if classes > 1 else 0.0
        mix_a, mix_b = 1.0 - e - share, share
    phi, p0, p1 = PHI_IDENTITY, 0.0, 0.0
    if row_loss is not None:
        phi, (p0, p1) = row_loss.phi, row_loss.parameters()
        scale *= row_loss.factor
    zero = float(empty == "zero")
    return Spec(mix_a, mix_b, temperature, softcap, z_loss, phi, p0, p1, dense_kind, dense_temperature, scale, zero)


cached_spec = lru_cache(maxsize=1024)(make_spec)


@lru_cache(maxsize=1024)
def cached_scalars(*settings: Any) -> tuple[float, ...]:
    """:func:`make_spec` as a plain tuple, which crosses the operator boundary in two thirds of the time."""
    return tuple(make_spec(*settings))


def check_extras(row_loss: object, loss_dtype: torch.dtype | None, options: object) -> None:
    """Raise TypeError for keyword arguments of a wrong type."""
    if not isinstance(options, Options):
        raise TypeError(f"cross_entropy: options must be softce.Options, not {type(options).__name__}")
    if isinstance(row_loss, type):
        raise TypeError(f"cross_entropy: row_loss must be a row loss, got the class: pass {row_loss.__name__}(..)")
    if row_loss is not None and not callable(row_loss):
        raise TypeError(f"cross_entropy: row_loss must be a row loss or a callable, not {type(row_loss).__name__}")
    if loss_dtype is not None and loss_dtype not in FLOATS:
        raise TypeError(f"cross_entropy: loss_dtype must be float64, float32, bfloat16 or float16, got {loss_dtype}")


def check_input(owner: str, input: Tensor) -> None:
    """Raise for logits that are none: no tensor, a sparse one, a scalar."""
    check_tensor(f"{owner}: input", input)
    if input.dim() == 0:
        raise RuntimeError(f"{owner}: input must have shape (C,), (N, C) or (N, C, d1, ..), got a scalar")


def check_dtype(owner: str, input: Tensor) -> None:
    """Raise for a dtype that no loss is computed in, as torch does."""
    if input.dtype not in FLOATS:
        raise NotImplementedError(f"{owner}: input must be float64, float32, bfloat16 or float16, got {input.dtype}")


def check_types(weight: Tensor | None, ignore_index: int, label_smoothing: float) -> None:
    if weight is not None:
        check_tensor("cross_entropy: weight", weight)
    check_number("cross_entropy: ignore_index", ignore_index, integral=True, tensor=True)
    check_number("cross_entropy: label_smoothing", label_smoothing, tensor=True)


def check_weight(weight: Tensor, input: Tensor, form: Target) -> None:
    classes = input.shape[1] if input.dim() > 1 else input.shape[0]
    if weight.dim() != 1 or weight.shape[0] != classes:
        raise RuntimeError(
            f"weight tensor should be defined either for all {classes} classes or no classes but got weight tensor "
            f"of shape: {list(weight.shape)}"
        )
    if weight.device != input.device:
        raise RuntimeError(f"Expected weight on the input's device {input.device}, got {weight.device}")
    if isinstance(form, ClassIndices):
        widened = weight.dtype == torch.float32 and input.dtype in (torch.bfloat16, torch.float16)
        if weight.dtype != input.dtype and not widened:
            raise RuntimeError(f"weight: expected scalar type {input.dtype} but found {weight.dtype}")
        if weight.requires_grad and torch.is_grad_enabled():
            raise RuntimeError(
                "weight: cross_entropy is not differentiable with respect to the weight for class indices. "
                "This input cannot have requires_grad True."
            )


def check_row_weight(row_weight: Tensor, device: torch.device, *shapes: tuple[int, ...]) -> None:
    """Raise for anything but a tensor of one of the shapes on the input's device."""
    check_tensor("row_weight", row_weight)
    if tuple(row_weight.shape) not in shapes:
        raise ValueError(f"row_weight must have shape {list(shapes[0])}, got {list(row_weight.shape)}")
    if row_weight.device != device:
        raise RuntimeError(f"Expected row_weight on the input's device {device}, got {row_weight.device}")
    if row_weight.is_complex():
        raise RuntimeError(f"row_weight must hold real numbers, got {row_weight.dtype}")

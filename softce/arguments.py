# SPDX-License-Identifier: BSD-3-Clause
"""Checks of single arguments that every loss, target form and row loss shares: each error names the argument."""

from __future__ import annotations

import warnings
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor


def is_dense(x: Tensor) -> bool:
    """Whether ``x`` is an ordinary tensor with strides: not sparse, not nested, not in a library's own layout."""
    return not x.is_nested and x.layout is torch.strided


def check_tensor(name: str, x: Any) -> None:
    """Raise TypeError for anything but a tensor, NotImplementedError for one that :func:`is_dense` does not take."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be Tensor, not {type(x).__name__}")
    if not is_dense(x):
        got = "a nested one: pad it" if x.is_nested else f"layout {x.layout}: call its to_dense()"
        raise NotImplementedError(f"{name} must be a dense tensor, got {got}")


def check_number(name: str, value: object, integral: bool = False, tensor: bool = False) -> None:
    """Raise TypeError for anything but a number: of Python, of NumPy, symbolic or, with ``tensor``, a tensor of one.

    A tensor with a gradient is none, for nothing would come back to it; nor is a bool an index.
    """
    if isinstance(value, Tensor):
        fine = tensor and value.dim() == 0 and not value.requires_grad and not (integral and value.is_floating_point())
    elif integral:
        fine = isinstance(value, (Integral, torch.SymInt)) and not isinstance(value, bool)
    else:
        fine = isinstance(value, (Real, torch.SymInt, torch.SymFloat))
    if not fine:
        want = "int" if integral else "float"
        hint = "; it is a constant, pass its item()" if isinstance(value, Tensor) else ""
        raise TypeError(f"{name} must be {want}, not {type(value).__name__}{hint}")


def check_reduction(reduction: str) -> str:
    """``"none"``, ``"mean"`` or ``"sum"``; torch's old name of the mean is still taken, as in torch."""
    if reduction in ("mean", "none", "sum"):
        return reduction
    if reduction == "elementwise_mean":
        warnings.warn("reduction='elementwise_mean' is deprecated, use reduction='mean'", stacklevel=3)
        return "mean"
    raise ValueError(f"{reduction} is not a valid value for reduction: expected 'none', 'mean' or 'sum'")

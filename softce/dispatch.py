# SPDX-License-Identifier: BSD-3-Clause
"""Which way a call takes: the kernels or the plain formula. Looks at devices, types and options, never at data."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor
from torch._C import _is_tracing, _len_torch_dispatch_stack
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor
from torch.compiler import is_compiling

from . import backends
from .autograd import transform_active
from .options import Options
from .validate import within_transform

PLAIN = (Tensor, torch.nn.Parameter)
TRACED = (FakeTensor, FunctionalTensor)  # what tracers pass: they record the operators

# Backends that can serve a device, best first.
_FOR_DEVICE = {"cpu": ("cpu",), "cuda": ("cuda", "triton"), "meta": ("cpu",)}


def is_plain(x: Tensor) -> bool:
    """True for an ordinary tensor outside any tracing: its data may be looked at and its memory written."""
    return type(x) in PLAIN and not is_compiling() and not _is_tracing() and _len_torch_dispatch_stack() == 0


def reasons_against_kernels(x: Tensor) -> list[str]:
    """Why no kernel can take logits like ``x``; empty if one can."""
    if transform_active():
        return ["a forward-mode AD level or torch.func transform is active"]
    if type(x) not in PLAIN and not isinstance(x, TRACED) and not is_compiling():
        return [f"no kernel for the tensor subclass {type(x).__name__}"]
    device = x.device.type
    if device == "meta":
        return []
    found = []
    for name in _FOR_DEVICE.get(device, ()):
        reasons = backends.unavailable(name)
        if not reasons:
            return []
        found += [f"{name}: {reason}" for reason in reasons]
    return found or [f"no kernel for device {device}"]


def cpu_kernels() -> bool:
    """Whether kernels take plain CPU tensors here and now: what :func:`use_kernel` says of them by default.

    For calls that no tracer records: that is the caller's to know, and asking again would be felt (quick.py).
    """
    return not within_transform() and not backends.unavailable("cpu")


def use_kernel(x: Tensor, options: Options) -> bool:
    """Whether the row operations take ``x``, as ``options.backend`` asks.

    Raises:
        RuntimeError: a backend asked for by name cannot run; with its reasons.
    """
    if options.backend == "reference":
        return False
    reasons = reasons_against_kernels(x)
    if options.backend == "auto":
        if reasons and options.explain:
            warnings.warn(f"softce: plain PyTorch formula used: {'; '.join(reasons)}", stacklevel=4)
        return not reasons
    if options.backend not in _FOR_DEVICE.get(x.device.type, ()):
        reasons = [f"it does not run on device {x.device.type}"]
    elif not transform_active():
        reasons = reasons or backends.unavailable(options.backend)
    if reasons:
        raise RuntimeError(f"softce: backend {options.backend!r} cannot run: {'; '.join(reasons)}")
    return True

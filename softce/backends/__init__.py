# SPDX-License-Identifier: BSD-3-Clause
"""The backends: which can run here, and why the others cannot.

A backend is a module of this package, imported when a tensor of its device first comes along. It implements the
operators of :mod:`softce.ops` for its dispatch key and has

- ``DEVICE``: the device type whose tensors it takes,
- ``reasons() -> list[str]``: why it cannot run on this machine; empty if it can,
- optionally ``refuses(logits) -> list[str]``: why it cannot take these logits (dtype and shape only, never data).
  Without it the backend takes every call of its device.

The ``reference`` backend is plain PyTorch (:mod:`softce.reference`) and takes everything.
"""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable
from types import ModuleType

import torch
from torch import Tensor
from torch.nn import Parameter

from ..autograd import transform_active
from ..options import BACKENDS, Options

NAMES = BACKENDS[1:]  # without "auto"
_DEVICES = {"cpu": "cpu", "triton": "cuda", "cuda": "cuda"}  # the modules' DEVICE, known without importing them

_modules: dict[str, ModuleType | str] = {}
_unavailable: dict[str, tuple[str, ...]] = {}
_resolved: dict[tuple[str, str], tuple[str, ...]] = {}
_refusers: dict[tuple[str, str], list[Callable[[Tensor], list[str]]]] = {}
_warned: set[str] = set()


def _module(name: str) -> ModuleType | str:
    """The backend's module, or the error that its import ended with."""
    if name not in _modules:
        try:
            _modules[name] = importlib.import_module(f".{name}", __name__)
        except ImportError as error:
            _modules[name] = f"softce.backends.{name} cannot be imported: {error}"
    return _modules[name]


def unavailable(name: str) -> list[str]:
    """Why the backend ``name`` cannot run on this machine; empty if it can.

    Raises:
        ValueError: there is no such backend.
    """
    if name not in NAMES:
        raise ValueError(f"backend must be one of {', '.join(NAMES)}, got {name!r}")
    if name == "reference":
        return []
    if name not in _unavailable:
        module = _module(name)
        _unavailable[name] = (module,) if isinstance(module, str) else tuple(module.reasons())
    return list(_unavailable[name])


def _resolve(device: str, backend: str) -> tuple[str, ...]:
    """Why no kernel can run for tensors of ``device`` under ``Options.backend``; empty if one can."""
    key = (device, backend)
    if key not in _resolved:
        names = [n for n in NAMES if _DEVICES.get(n) == device and backend in ("auto", n)]
        found = {name: unavailable(name) for name in names}
        usable = [name for name in names if not found[name]]
        if backend == "reference":
            reasons = ["the reference was asked for"]
        elif usable or device == "meta":  # meta tensors: the operators' fake implementations
            reasons = []
        elif backend != "auto" and not names:
            reasons = [f"it takes {_DEVICES[backend]} tensors, these are on {device}"]
        else:
            reasons = [f"{name}: {why}" for name in names for why in found[name]] or [
                f"{device} tensors have no kernel"
            ]
        checks = [getattr(_module(name), "refuses", None) for name in usable]
        _refusers[key] = [] if None in checks else [check for check in checks if check is not None]
        _resolved[key] = tuple(reasons)
    return _resolved[key]


# torch.compile calls it while tracing and takes the result as a constant, instead of tracing imports. This is what
# torch.compiler.assume_constant_result does, without loading the compiler for it.
_resolve._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _refusals(logits: Tensor, key: tuple[str, str]) -> list[str]:
    """Why every usable backend refuses these logits; empty if one takes them."""
    refusals = [check(logits) for check in _refusers[key]]
    return [] if not all(refusals) else [reason for reasons in refusals for reason in reasons]


def use_kernel(logits: Tensor, options: Options) -> bool:
    """Whether a kernel computes this call (else the plain PyTorch formula does).

    Raises:
        RuntimeError: ``options.backend`` names a backend that cannot run the call; with its reasons.
    """
    backend = options.backend
    key = (logits.device.type, backend)
    reasons = list(_resolve(*key))
    if not reasons and transform_active():
        reasons = ["forward-mode AD and torch.func transforms need the plain PyTorch formula"]
    elif not reasons:
        reasons = _refusals(logits, key)
    if not reasons:
        return True
    if backend == "reference":
        return False
    if backend != "auto":
        raise RuntimeError(f"softce: backend {backend!r} cannot run this call: {'; '.join(reasons)}")
    if options.explain:
        warnings.warn(f"softce: the plain PyTorch formula computes this call: {'; '.join(reasons)}", stacklevel=3)
    elif not torch.compiler.is_compiling() and logits.device.type in ("cpu", "cuda"):
        _warn_missing(logits.device.type)
    return False


def _warn_missing(device: str) -> None:
    """Says once that a device which ought to have kernels has none."""
    reasons = _resolve(device, "auto")
    if reasons and device not in _warned:
        _warned.add(device)
        warnings.warn(
            f"softce: no kernel for {device} tensors, so the plain PyTorch formula computes them, slowly: "
            f"{'; '.join(reasons)}",
            stacklevel=4,
        )


def is_plain(logits: Tensor) -> bool:
    """True for an ordinary tensor outside of tracing: one whose values may be looked at."""
    return (
        type(logits) in (Tensor, Parameter)
        and not torch.compiler.is_compiling()
        and torch._C._len_torch_dispatch_stack() == 0
    )


unavailable("cpu")  # loads the library, so that the operators are complete for whoever calls them directly

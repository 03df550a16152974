# SPDX-License-Identifier: BSD-3-Clause
"""Drop-in without touching code: every ``F.cross_entropy`` of the process on softce.

``torch.nn.functional.cross_entropy`` and ``torch.nn.CrossEntropyLoss`` end in the operator
``aten::cross_entropy_loss``, and the dispatcher lets a library put its own implementation there. What softce cannot
take goes on to torch's own.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from .arguments import is_dense
from .dispatch import reasons_against_kernels
from .functional import cross_entropy
from .options import Options
from .settings import FLOATS

_REDUCTIONS = ("none", "mean", "sum")
# Autograd keys see a call before autograd does; the backend keys serve inference mode; the autocast keys come first of
# all and would widen half-precision logits in a copy of their own.
_KEYS = ("CPU", "AutogradCPU", "AutocastCPU", "CUDA", "AutogradCUDA", "AutocastCUDA")
_OPTIONS = Options(validate=False)  # torch takes any probabilities, and says nothing

_installed: torch.library.Library | None = None
_lock = threading.Lock()
_blocks = 0  # of installed() that are open
_before = False  # whether it was installed when the first of them began


def _torch_own(
    input: Tensor, target: Tensor, weight: Tensor | None, reduction: int, ignore_index: int, label_smoothing: float
) -> Tensor:
    op = torch.ops.aten.cross_entropy_loss.default
    if torch.is_autocast_enabled(input.device.type) and input.is_floating_point():
        # Torch's autocast rule for this operator, which the override stands in front of.
        if input.dtype in (torch.bfloat16, torch.float16):
            input = input.float()
        if target.dtype in (torch.bfloat16, torch.float16):
            target = target.float()
        if weight is not None and weight.dtype in (torch.bfloat16, torch.float16):
            weight = weight.float()
    return op.decompose(input, target, weight, reduction, ignore_index, label_smoothing)  # type: ignore[no-any-return]


def _cross_entropy_loss(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    reduction: int = 1,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
) -> Tensor:
    dense = all(x is None or is_dense(x) for x in (input, target, weight))
    takes = dense and input.dtype in FLOATS and input.dim() > 0 and not reasons_against_kernels(input)
    if not takes:
        return _torch_own(input, target, weight, reduction, ignore_index, label_smoothing)
    loss = cross_entropy(
        input,
        target,
        weight,
        ignore_index=ignore_index,
        reduction=_REDUCTIONS[reduction],
        label_smoothing=label_smoothing,
        options=_OPTIONS,
    )
    assert isinstance(loss, Tensor)
    return loss


def _forget_dispatch() -> None:
    """Tracers look an operator's kernels up once and keep what they found: it is not true any more."""
    getattr(torch.ops.aten.cross_entropy_loss.default, "_dispatch_cache", {}).clear()


def install() -> None:
    """Run every ``F.cross_entropy`` and ``nn.CrossEntropyLoss`` of this process on softce, other libraries' included.

    What softce has no kernel for (a device, a dtype, a transform) goes to torch's own implementation. Calling it twice
    is the same as once. Functions that ``torch.compile`` compiled before keep what they were compiled to. Forked
    processes have it too; spawned ones call it themselves, or run as ``torchrun -m softce run train.py``.
    """
    global _installed
    if _installed is not None:
        return
    library = torch.library.Library("aten", "IMPL")
    with warnings.catch_warnings():
        # The dispatcher says that torch's own kernel is overridden, which is what was asked for.
        warnings.filterwarnings("ignore", message=".*Overriding a previously registered kernel", category=UserWarning)
        warnings.filterwarnings("ignore", message=".*Warning only once for all operators", category=UserWarning)
        for key in _KEYS:
            library.impl("cross_entropy_loss", _cross_entropy_loss, key)
    _forget_dispatch()
    _installed = library


def uninstall() -> None:
    """Give ``F.cross_entropy`` back to torch; nothing happens if it was not installed."""
    global _installed
    if _installed is not None:
        _installed._destroy()
        _forget_dispatch()
        _installed = None


@contextmanager
def installed() -> Iterator[None]:
    """``install()`` for the length of a ``with`` block; what was there before is there again afterwards.

    Blocks may overlap, in threads too: the last one to end puts back what was there before the first one began.
    """
    global _blocks, _before
    with _lock:
        if not _blocks:
            _before = _installed is not None
        _blocks += 1
        install()
    try:
        yield
    finally:
        with _lock:
            _blocks -= 1
            install() if _blocks or _before else uninstall()

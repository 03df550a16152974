# SPDX-License-Identifier: BSD-3-Clause
"""The CUDA C++ backend: ``row_stats`` and ``row_fused`` with the row held on chip (csrc/cuda), for NVIDIA GPUs.

A row stays in the shared memory of one block, or of a cluster of blocks, between the read of its logits and the write
of its gradient; ``csrc/cuda/plan.h`` says which. Everything else (``row_grad``, the layout ``(B, C, S)``, float64,
extra statistics) is left to the Triton backend. :mod:`softce.backends.gpu` chooses between the two; its ``FASTER`` is
the table of what was measured to be faster here.

Like Triton's, a call waits for nothing, adds up nothing by atomics, can be captured in a CUDA graph, and turns a class
out of range into a NaN loss and gradient of its row.
"""

from __future__ import annotations

import ctypes
import functools
from collections import Counter
from typing import Any

import torch
from torch import Tensor

from .. import _library
from ..ops import KernelTarget, Spec

CALLS: Counter[str] = Counter()  # calls of this process, by operator: proof of what ran
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def reasons() -> list[str]:
    """Why the kernels cannot run on this machine; empty if they can. Registers the operators then."""
    found = []
    not_loaded = _library.CUDA.reason()
    if not_loaded is not None:
        found.append(not_loaded)
    if torch.version.cuda is None:
        found.append("this torch is built without CUDA")
    elif not torch.cuda.is_available():
        found.append("torch sees no GPU")
    elif not found:
        devices = [_device_reason(index) for index in range(torch.cuda.device_count())]
        if all(devices):
            found += dict.fromkeys(devices)
    if not found:
        from . import gpu

        gpu.register()
    return found


@functools.cache
def _device_reason(index: int) -> str:
    ask = _library.CUDA.function("softce_cuda_device_reason", ctypes.c_char_p, ctypes.c_int)
    text: bytes = ask(index)
    return text.decode()


@functools.cache
def _limit(name: str) -> int:
    return int(_library.CUDA.function(f"softce_cuda_max_{name}", ctypes.c_int64)())


def reasons_against(logits: Tensor) -> list[str]:
    """Why these logits cannot be taken; looks at shape, type and device only."""
    found = []
    if logits.dtype not in DTYPES:
        found.append(f"no kernel for {logits.dtype}")
    if logits.device.type != "cuda":
        found.append(f"no kernel for device {logits.device}")
    elif _device_reason(logits.device.index):
        found.append(_device_reason(logits.device.index))
    if logits.dim() != 2:
        found.append(f"logits must be rows (R, C), got {tuple(logits.shape)}")
    elif not 1 <= logits.shape[1] <= _limit("classes"):
        found.append(f"1 to {_limit('classes')} classes, got {logits.shape[1]}")
    return found


def reasons_against_call(operator: str, logits: Tensor, target: KernelTarget, spec: Spec, extras: bool) -> list[str]:
    """Why a call on logits that can be taken cannot be; looks at shapes and options only."""
    found = []
    if extras:
        found.append("no extra statistics")
    if target.index is not None and target.index.dim() == 2 and target.index.shape[1] > _limit("entries"):
        found.append(f"at most {_limit('entries')} entries a row, got {target.index.shape[1]}")
    return found


def plan(
    device: int,
    rows: int,
    classes: int,
    entries: int,
    dtype: torch.dtype,
    dense: torch.dtype | None,
    fused: bool = True,
) -> dict[str, str | int]:
    """How rows are laid out on a GPU: ``mode`` (``resident``: read once, ``twice``, ``stats``), blocks and warps a row.

    Args:
        device: index of the GPU.
        rows: R.
        classes: C.
        entries: K of a sparse target, 0 for a dense one.
        dtype: of the logits.
        dense: dtype of a dense target, ``None`` for a sparse one.
        fused: ``row_fused``, else ``row_stats``.

    Returns:
        ``mode``, ``cluster`` (blocks a row), ``warps`` (a block), ``shared`` (bytes of shared memory a block).

    Raises:
        RuntimeError: the device cannot run the kernels.
    """
    if _device_reason(device):
        raise RuntimeError(f"softce: no plan for device {device}: {_device_reason(device)}")
    argtypes = (ctypes.c_int, ctypes.c_int64, ctypes.c_int64, *[ctypes.c_int] * 4)
    ask = _library.CUDA.function("softce_cuda_plan", ctypes.c_char_p, *argtypes)
    answer: bytes = ask(device, rows, classes, entries, dtype.itemsize, dense.itemsize if dense else 0, fused)
    mode, *numbers = answer.decode().split()
    return {"mode": mode, **dict(zip(("cluster", "warps", "shared"), map(int, numbers), strict=True))}


def _call(operator: str, logits: Tensor, *arguments: Any) -> Any:
    CALLS[operator] += 1
    return getattr(torch.ops.softce_cuda, operator).default(logits, *arguments)


def row_stats(logits: Tensor, *arguments: Any) -> Tensor:
    """``softce::row_stats`` without extras."""
    stats: Tensor = _call("row_stats", logits, *arguments)
    return stats


def row_fused(logits: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    """``softce::row_fused`` without extras."""
    loss, dlogits, stats = _call("row_fused", logits, *arguments)
    return loss, dlogits, stats


def row_fused_(logits: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    """``softce::row_fused_`` without extras."""
    loss, stats = _call("row_fused_", logits, *arguments)
    return loss, stats

# SPDX-License-Identifier: BSD-3-Clause
"""The Triton backend: every operator, every option, on every GPU that Triton knows. No build.

A call is one launch of ``row_kernel``; ``row_fused`` has one tiny launch before it where the mean's denominator depends
on the target, and one behind it for the sum over rows. Nothing waits for the GPU, nothing is added up by atomics:
results are the same bits from run to run on one kind of GPU, and a call can be captured in a CUDA graph.

A class out of range cannot raise without waiting: the loss and the gradient of its row are NaN (with
``TRITON_DEBUG=1`` a device assertion says so). Nothing is read or written at such an index.
"""

from __future__ import annotations

import functools
import importlib.util
import os
from collections import Counter
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..ops import DENSE_LOGITS, STATS, STATS_EXTRA, KernelTarget, Spec, acc_dtype, rows_of
from . import triton_configs as configs

LAUNCHES: Counter[str] = Counter()  # kernel launches of this process, by kernel: proof of what ran
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
INTERPRETED_SMS = 2


def interpreted() -> bool:
    """True where the kernels run in Triton's interpreter, on CPU tensors."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def reasons() -> list[str]:
    """Why the kernels cannot run on this machine; empty if they can. Registers the operators then."""
    found = []
    if importlib.util.find_spec("triton") is None:
        found.append("triton is not installed (pip install triton)")
    if not torch.cuda.is_available():
        why = "this torch has no GPU support" if _cpu_only() else "no device or no driver"
        found.append(f"torch sees no GPU: {why}")
    if not found:
        from . import gpu

        gpu.register()
    return found


def _cpu_only() -> bool:
    return torch.version.cuda is None and torch.version.hip is None


def reasons_against(logits: Tensor) -> list[str]:
    """Why these logits cannot be taken; looks at type and device only."""
    found = []
    if logits.dtype not in DTYPES:
        found.append(f"no kernel for {logits.dtype}")
    if logits.device.type != ("cpu" if interpreted() else "cuda"):
        found.append(f"no kernel for device {logits.device}")
    return found


@functools.cache
def _multiprocessors(index: int) -> int:
    return int(torch.cuda.get_device_properties(index).multi_processor_count)


def multiprocessors(device: torch.device) -> int:
    """Of a GPU; the interpreter counts as two."""
    return _multiprocessors(device.index) if device.type == "cuda" else INTERPRETED_SMS


class Problem(NamedTuple):
    """A call in the kernels' terms, but for what it writes."""

    logits: Any
    target: Any
    scalars: Any
    low: Any
    sizes: Any
    flags: int
    form: str
    device: torch.device
    acc: torch.dtype


def _block(tensor: Tensor) -> Any:
    from .triton_blocks import Block

    return Block(tensor, tensor.stride(0), 1 if tensor.dim() == 2 else tensor.stride(1))


def _scalars(spec: Spec, scale: float, acc: torch.dtype) -> tuple[Any, Any]:
    """The kernel's scalars, as float32 and what float32 loses."""
    from .triton_blocks import Scalars

    slope = 1.0 / spec.temperature
    exact = Scalars(
        x_scale=1.0 / spec.softcap if spec.softcap else slope,
        y_scale=spec.softcap / spec.temperature,
        slope=slope,
        mix_a=spec.mix_a,
        mix_b=spec.mix_b,
        z_loss=spec.z_loss,
        phi_p0=spec.phi_p0,
        dense_scale=1.0 / spec.dense_temperature,
        scale=scale,
    )
    if acc != torch.float64:
        return exact, None
    high = torch.tensor(exact, dtype=torch.float64).float().double().tolist()
    return Scalars(*high), Scalars(*(a - b for a, b in zip(exact, high, strict=True)))


def _spans_31_bits(tensor: Tensor | None) -> bool:
    """Whether offsets within a tile, its lanes beyond the end included, may need more than 31 bits."""
    if tensor is None:
        return False
    if tensor.dim() == 2:
        return configs.FEW_TILE * tensor.stride(0) + tensor.shape[1] + 2**16 >= 2**31
    return (tensor.shape[1] + configs.FEW_TILE) * tensor.stride(1) + tensor.shape[2] >= 2**31


def opposed(target: KernelTarget, spec: Spec) -> bool:
    """Whether a class's target weight may be the sum of parts of different signs.

    Dense probabilities are put together by class in any case. A listed value is negative only beside a rest.
    """
    if target.dense is not None and spec.dense_kind != DENSE_LOGITS:
        return False
    return target.rest is not None or spec.mix_a * spec.mix_b < 0


def problem(
    logits: Tensor, target: KernelTarget, ignore_index: int, spec: Spec, extras: bool = False, scale: float = 1.0
) -> Problem:
    """Describes a call to the kernels."""
    from . import triton_blocks as k

    index, dense = target.index, target.dense
    if index is not None and index.dim() == 1:
        index = index[:, None]
    entries = 0 if index is None else index.shape[1]
    planes = logits.dim() == 3
    uniform = bool(spec.mix_b) or target.rest is not None
    flags = {
        k.EXTRAS: extras,
        k.SOFTCAP: bool(spec.softcap),
        k.TEACHER: dense is not None and spec.dense_kind == DENSE_LOGITS,
        k.UNIFORM: uniform,
        k.PLANES: planes,
        k.WIDE: _spans_31_bits(logits) or _spans_31_bits(dense),
        k.EMPTY_ZERO: bool(spec.empty_zero),
        k.OPPOSED: opposed(target, spec),
    }
    if extras:
        form = configs.EXTRAS
    elif flags[k.SOFTCAP] or flags[k.TEACHER]:
        form = configs.HEAVY
    elif dense is not None:
        form = configs.DENSE
    else:
        form = configs.UNIFORM if uniform else configs.SPARSE
    acc = acc_dtype(logits.dtype)
    block = k.Block(None, 0, 0) if dense is None else _block(dense)
    return Problem(
        _block(logits),
        k.Target(index, target.value, target.rest, block.data, block.batch_stride, block.class_stride, target.weight),
        *_scalars(spec, scale, acc),
        k.Sizes(logits.shape[0], logits.shape[1], logits.shape[2] if planes else 1, entries, ignore_index),
        sum(flag.value for flag, on in flags.items() if on),
        form,
        logits.device,
        acc,
    )


def _launch(kernel: Any, programs: int, *arguments: Any, **options: Any) -> None:
    """The one place where kernels are launched; the current device is the tensors' own."""
    LAUNCHES[kernel.fn.__name__] += 1
    kernel[(programs,)](*arguments, enable_fp_fusion=True, **options)


def _run_rows(p: Problem, mode: Any, rows: Any, out: Tensor | None, phi: int = 0, coef_b: bool = False) -> None:
    from . import triton_blocks as k
    from .triton_kernels import row_kernel

    config, programs = launch_shape(p)
    flags = p.flags | (k.COEF_B.value if coef_b else 0)
    if mode is k.GRAD:
        flags &= ~k.OPPOSED.value
    if config.block >= p.sizes.classes:
        flags |= k.RESIDENT.value
    if programs < tiles_of(p, config):
        flags |= k.LOOP.value
    _launch(
        row_kernel, programs, p.logits, None if out is None else _block(out), p.target, rows, p.scalars, p.low, p.sizes,
        MODE=mode.value, PHI=phi, FLAGS=flags, K=configs.power_of_two(p.sizes.entries), ROWS=config.rows,
        BLOCK=config.block, STAGES=config.stages, num_warps=config.warps,
    )  # fmt: skip


def tiles_of(p: Problem, config: configs.Config) -> int:
    """How many tiles a call has."""
    from .triton_blocks import PLANES

    if p.flags & PLANES.value:
        return int(-(-p.sizes.inner // config.rows) * p.sizes.batch)
    return int(-(-p.sizes.batch // config.rows))


def launch_shape(p: Problem) -> tuple[configs.Config, int]:
    """The configuration of a call and its number of programs."""
    from .triton_blocks import PLANES

    sizes = p.sizes
    inner = sizes.inner if p.flags & PLANES.value else 0
    config = configs.choose(p.form, sizes.classes, inner, sizes.entries, p.acc == torch.float64)
    most = multiprocessors(p.device) * config.per_sm if config.per_sm else configs.MOST_PROGRAMS
    return config, max(1, min(tiles_of(p, config), most))


def _empty(p: Problem, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
    return torch.empty(shape, dtype=dtype or p.acc, device=p.device)


def _rows(**fields: Any) -> Any:
    from .triton_kernels import Rows

    return Rows(**{**dict.fromkeys(Rows._fields), **fields})


def row_stats(
    logits: Tensor, index: Tensor | None, value: Tensor | None, rest: Tensor | None, dense: Tensor | None,
    weight: Tensor | None, ignore_index: int, spec: list[float], extras: bool,
) -> Tensor:  # fmt: skip
    """``softce::row_stats``."""
    from .triton_blocks import STATS as MODE

    p = problem(logits, KernelTarget(index, value, rest, dense, weight), ignore_index, Spec(*spec), extras)
    stats = _empty(p, STATS_EXTRA if extras else STATS, rows_of(logits))
    if stats.numel():
        _run_rows(p, MODE, _rows(stats=stats), None)
    return stats


def _grad(
    out: Tensor, logits: Tensor, lse: Tensor, coef: Tensor, target: KernelTarget, ignore_index: int, spec: Spec
) -> None:
    from .triton_blocks import GRAD as MODE

    if logits.numel():
        p = problem(logits, target, ignore_index, spec)
        _run_rows(p, MODE, _rows(lse=lse, coef=coef), out, coef_b=coef.shape[0] == 3)


def row_grad(
    logits: Tensor, lse: Tensor, coef: Tensor, index: Tensor | None, value: Tensor | None, rest: Tensor | None,
    dense: Tensor | None, weight: Tensor | None, ignore_index: int, spec: list[float],
) -> Tensor:  # fmt: skip
    """``softce::row_grad``."""
    out = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
    _grad(out, logits, lse, coef, KernelTarget(index, value, rest, dense, weight), ignore_index, Spec(*spec))
    return out


def row_grad_(
    logits: Tensor, lse: Tensor, coef: Tensor, index: Tensor | None, value: Tensor | None, rest: Tensor | None,
    dense: Tensor | None, weight: Tensor | None, ignore_index: int, spec: list[float],
) -> None:  # fmt: skip
    """``softce::row_grad_``."""
    _grad(logits, logits, lse, coef, KernelTarget(index, value, rest, dense, weight), ignore_index, Spec(*spec))


def _fused(
    out: Tensor, logits: Tensor, target: KernelTarget, row_weight: Tensor | None, ignore_index: int, spec: Spec,
    mean: bool, extras: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Loss and statistics; the gradient goes to ``out``."""
    from .triton_blocks import FUSED as MODE
    from .triton_kernels import COUNT_PARTS, count_kernel, loss_kernel

    total = rows_of(logits)
    by_count = mean and (target.index is not None or row_weight is not None or total == 0)
    # Rows of a dense target count 1 each: their number needs no kernel.
    scale = spec.scale / total if mean and not by_count else spec.scale
    p = problem(logits, target, ignore_index, spec, extras, scale)
    _, programs = launch_shape(p)
    loss = torch.empty((), dtype=p.acc, device=p.device)
    entries = configs.power_of_two(p.sizes.entries)
    count_rows = max(1, 1024 // entries)
    parts = max(1, min(COUNT_PARTS.value, -(-total // count_rows)))
    rows = _rows(
        stats=_empty(p, STATS_EXTRA if extras else STATS, total),
        row_weight=row_weight,
        loss_parts=_empty(p, programs, dtype=torch.float64),
        count_parts=_empty(p, parts, dtype=torch.float64) if by_count else None,
        parts=parts,
    )
    if by_count:
        _launch(
            count_kernel, parts, p.target, rows, p.sizes, DENSE=target.dense is not None, K=entries, ROWS=count_rows,
            num_warps=4,
        )  # fmt: skip
    if total == 0:
        rows.loss_parts.zero_()
    else:
        _run_rows(p, MODE, rows, out, int(spec.phi))
    _launch(
        loss_kernel, 1, loss, rows, p.scalars, p.low, programs, ZERO=bool(spec.empty_zero),
        BLOCK=min(8192, configs.power_of_two(programs)), num_warps=16,
    )  # fmt: skip
    return loss, rows.stats


def row_fused(
    logits: Tensor, index: Tensor | None, value: Tensor | None, rest: Tensor | None, dense: Tensor | None,
    weight: Tensor | None, row_weight: Tensor | None, ignore_index: int, spec: list[float], mean: bool, extras: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """``softce::row_fused``."""
    out = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
    target = KernelTarget(index, value, rest, dense, weight)
    loss, stats = _fused(out, logits, target, row_weight, ignore_index, Spec(*spec), mean, extras)
    return loss, out, stats


def row_fused_(
    logits: Tensor, index: Tensor | None, value: Tensor | None, rest: Tensor | None, dense: Tensor | None,
    weight: Tensor | None, row_weight: Tensor | None, ignore_index: int, spec: list[float], mean: bool, extras: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """``softce::row_fused_``."""
    target = KernelTarget(index, value, rest, dense, weight)
    return _fused(logits, logits, target, row_weight, ignore_index, Spec(*spec), mean, extras)

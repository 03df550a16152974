# SPDX-License-Identifier: BSD-3-Clause
"""The upstream gradient on a gradient that is ready: the factor stays on the GPU, and 1 moves no memory."""
# mypy: disable-error-code="import-untyped,import-not-found,no-untyped-def,no-untyped-call,untyped-decorator"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 4096
_PROGRAMS_PER_PROCESSOR = 8


@triton.jit
def scale_kernel(x, factor, count, BLOCK: tl.constexpr):
    """x (count,) *= factor (1,). Bytes: none for a factor of 1, else one read and one write of x."""
    f = tl.load(factor)
    if f != 1.0:
        lanes = tl.arange(0, BLOCK)
        whole = count // BLOCK * BLOCK
        first = tl.program_id(0).to(tl.int64) * BLOCK
        for start in tl.range(first, whole, tl.num_programs(0).to(tl.int64) * BLOCK):
            at = x + tl.multiple_of(start, BLOCK) + lanes
            value = tl.load(at)
            tl.store(at, (value.to(f.dtype) * f).to(value.dtype))
        if tl.program_id(0) == 0:  # what no whole block holds; a mask would keep the others from wide accesses
            inside = whole + lanes < count
            value = tl.load(x + whole + lanes, mask=inside)
            tl.store(x + whole + lanes, (value.to(f.dtype) * f).to(value.dtype), mask=inside)


def scale_(x: Tensor, factor: Tensor) -> Tensor:
    """``x *= factor`` in place, without waiting for the GPU; the product is formed in the factor's dtype.

    Args:
        x: contiguous.
        factor: one element, on the same device, at least as wide as ``x``.
    """
    blocks = triton.cdiv(x.numel(), BLOCK)
    if blocks:
        index = x.device.index
        processors = torch.cuda.get_device_properties(index).multi_processor_count if x.is_cuda else 1
        grid = (min(blocks, _PROGRAMS_PER_PROCESSOR * processors),)
        with torch.cuda.device_of(x):
            scale_kernel[grid](x, factor, x.numel(), BLOCK=BLOCK)
    return x

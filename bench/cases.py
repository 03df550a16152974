# SPDX-License-Identifier: BSD-3-Clause
"""What is measured: shapes, dtypes and kinds of target, and the inputs made from them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

SMOOTHING = 0.1
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


Shape = tuple[int, ...]


def _indices(shape: Shape, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    return torch.randint(shape[1], (shape[0], *shape[2:]), generator=generator)


def _probabilities(shape: Shape, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    return torch.empty(shape).normal_(generator=generator).softmax(1).to(dtype)


@dataclass(frozen=True)
class Kind:
    """A kind of target: how it is made for logits of a shape and dtype, and which arguments the loss gets with it."""

    name: str
    make: Callable[[Shape, torch.dtype, torch.Generator], Tensor]
    dense: bool
    smoothing: float = 0.0

    @property
    def kwargs(self) -> dict[str, float]:
        return {"label_smoothing": self.smoothing} if self.smoothing else {}


KINDS = {
    kind.name: kind
    for kind in (
        Kind("hard", _indices, dense=False),
        Kind("smoothed", _indices, dense=False, smoothing=SMOOTHING),
        Kind("soft", _probabilities, dense=True),
        Kind("soft+smoothed", _probabilities, dense=True, smoothing=SMOOTHING),
    )
}


@dataclass(frozen=True)
class Case:
    """One measurement: logits of ``shape`` (N, C) or (N, C, d1, ..) in ``dtype`` with one kind of target."""

    shape: Shape
    dtype: str = "float32"
    kind: str = "hard"

    @property
    def label(self) -> str:
        return "x".join(map(str, self.shape))

    @property
    def id(self) -> str:
        return f"{self.label}-{self.dtype}-{self.kind}"

    @property
    def classes(self) -> int:
        return self.shape[1]

    @property
    def elements(self) -> int:
        return math.prod(self.shape)

    @property
    def rows(self) -> int:
        return self.elements // self.classes

    @property
    def logits_bytes(self) -> int:
        return self.elements * DTYPES[self.dtype].itemsize

    @property
    def gradient_bytes(self) -> int:
        return self.logits_bytes

    @property
    def traffic(self) -> dict[str, float]:
        """Bytes that must cross the memory bus in forward + backward, and what a memcpy of the logits moves.

        Read the logits once and the target once (8 bytes a row for an index, an element's size for a dense value),
        write the gradient once.
        """
        target = self.logits_bytes if KINDS[self.kind].dense else 8 * self.rows
        memcpy = 2 * self.logits_bytes
        return {
            "memcpy_bytes": memcpy,
            "least_bytes": memcpy + target,
            "least_over_memcpy": (memcpy + target) / memcpy,
        }


@dataclass
class Inputs:
    case: Case
    logits: Tensor  # a leaf that requires grad
    target: Tensor

    @property
    def kwargs(self) -> dict[str, float]:
        return KINDS[self.case.kind].kwargs


def make_inputs(case: Case, seed: int = 0) -> Inputs:
    """Normal logits (std 2) with one outlier of +12 a row, as a trained model's are, and a target of the kind."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.empty(case.shape).normal_(std=2.0, generator=generator)
    spot = _indices(case.shape, torch.int64, generator).unsqueeze(1)
    logits.scatter_add_(1, spot, torch.full(spot.shape, 12.0))
    logits = logits.to(DTYPES[case.dtype])
    target = KINDS[case.kind].make(case.shape, logits.dtype, generator)
    return Inputs(case, logits.requires_grad_(), target)


SMALL = ((32, 10), (256, 10))
FEW_CLASSES = ((65536, 10), (65536, 100))
MIDDLE = ((8192, 1000), (16384, 1000))
LARGE = ((512, 32768), (256, 65536), (128, 131072), (64, 262144))  # N * C = 2^24
LARGE_OTHER = ((256, 131072), (4, 262144))
SEGMENTATION = ((8, 21, 256, 256), (4, 150, 128, 128))
SHAPES = SMALL + FEW_CLASSES + MIDDLE + LARGE + LARGE_OTHER + SEGMENTATION
ONLY_FLOAT32 = ((256, 65536), (256, 131072))  # between two shapes that are there in both dtypes

QUICK_SHAPES = ((32, 10), (8192, 10), (512, 1000), (64, 32768), (1, 21, 64, 64))


def all_cases(quick: bool = False) -> list[Case]:
    """Every shape x dtype x kind of the logits section."""
    return [
        Case(shape, dtype, kind)
        for dtype in DTYPES
        for shape in (QUICK_SHAPES if quick else SHAPES)
        for kind in KINDS
        if dtype == "float32" or shape not in ONLY_FLOAT32
    ]


def select(cases: Iterable[Any], patterns: Iterable[str]) -> list[Any]:
    """The cases whose id contains one of ``patterns`` (all, if there is none).

    A pattern of several words, ``"32768 bfloat16"``, wants each of them.
    """
    wanted = [pattern.split() for pattern in patterns]
    return [c for c in cases if not wanted or any(all(word in c.id for word in words) for words in wanted)]

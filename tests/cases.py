# SPDX-License-Identifier: BSD-3-Clause
"""The table of cases that every check shares: shapes x targets x options x memory layouts.

``for case in cases(): input, target, kwargs = case.make(device, dtype)`` and then
``softce.cross_entropy(input, target, **kwargs)``. Cases are small: each stands for a branch of the code, not for load.
The same case gives the same numbers everywhere; logits have a planted outlier in each row, because without one a wrong
maximum or a lost term does not show.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import softce

Shape = tuple[int, ...]
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)

# (C,), (N, C) or (N, C, d1, ..)
SHAPES: tuple[Shape, ...] = (
    (7,),
    (1, 1),
    (4, 1),
    (5, 11),
    (33, 3),
    (70, 10),  # more rows than one group of few-class rows
    (3, 257),
    (2, 4099),  # several blocks and a tail
    (1, 20011),  # one long row: split within the row
    (2, 5, 7),
    (2, 300, 3),
    (2, 21, 4, 5),
    (1, 3, 67),
    (2, 3, 2, 2, 2),
)

OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "sum": {"reduction": "sum"},
    "none": {"reduction": "none"},
    "smoothed": {"label_smoothing": 0.1},
    "smoothed_sum": {"label_smoothing": 0.3, "reduction": "sum"},
    "smoothed_none": {"label_smoothing": 0.1, "reduction": "none"},
    "smoothing_1": {"label_smoothing": 1.0},
    "others": {"label_smoothing": 0.2, "smoothing": "others"},
    "temperature": {"temperature": 2.5},
    "cold": {"temperature": 0.5},
    "softcap": {"softcap": 8.0},
    "z_loss": {"z_loss": 0.01},
    "everything": {
        "label_smoothing": 0.1,
        "smoothing": "others",
        "temperature": 1.5,
        "softcap": 10.0,
        "z_loss": 0.001,
    },
    "everything_none": {
        "label_smoothing": 0.2,
        "temperature": 0.8,
        "softcap": 20.0,
        "z_loss": 0.01,
        "reduction": "none",
    },
}
TORCH_OPTIONS = {"reduction", "label_smoothing", "ignore_index"}

ROW_LOSSES: dict[str, softce.row_losses.RowLoss] = {
    "focal": softce.Focal(2.0, 0.25),
    "focal_half": softce.Focal(0.5),
    "relaxation": softce.LabelRelaxation(0.1),
    "generalized": softce.GeneralizedCrossEntropy(0.7),
    "poly1": softce.Poly1(2.0),
}

# ---- targets: (shape, dtype, generator) -> what cross_entropy takes ----


def row_shape(shape: Shape) -> Shape:
    """The shape of one value a row."""
    return () if len(shape) == 1 else (shape[0], *shape[2:])


def class_count(shape: Shape) -> int:
    return shape[0] if len(shape) == 1 else shape[1]


def indices(shape: Shape, dtype: torch.dtype, g: torch.Generator) -> Tensor:
    return torch.randint(class_count(shape), row_shape(shape), generator=g)


def some_ignored(shape: Shape, dtype: torch.dtype, g: torch.Generator) -> Tensor:
    index = indices(shape, dtype, g).reshape(-1)
    index[1::3] = -100
    return index.reshape(row_shape(shape))


def byte_indices(shape: Shape, dtype: torch.dtype, g: torch.Generator) -> Tensor:
    return indices(shape, dtype, g).clamp(max=255).to(torch.uint8)


def probabilities(shape: Shape, dtype: torch.dtype, g: torch.Generator) -> Tensor:
    return torch.randn(shape, generator=g).softmax(0 if len(shape) == 1 else 1).to(dtype)


def wide_probabilities(shape: Shape, dtype: torch.dtype, g: torch.Generator) -> Tensor:
    """In the dtype that half precision accumulates in."""
    return probabilities(shape, torch.float64 if dtype == torch.float64 else torch.float32, g)


def unnormalised(shape: Shape, dtype: torch.dtype, g: torch.Generator) -> Tensor:
    """Dense weights that do not sum to 1, some of them 0."""
    t = torch.rand(shape, generator=g) * 1.5 - 0.3
    return t.clamp_min(0).to(dtype)


def top_k(rest: str, log: bool = False) -> Callable[[Shape, torch.dtype, torch.Generator], softce.TopK]:
    def make(shape: Shape, dtype: torch.dtype, g: torch.Generator) -> softce.TopK:
        rows, classes = row_shape(shape), class_count(shape)
        k = min(4, classes)
        index = torch.rand((*rows, classes), generator=g).argsort(-1)[..., :k].contiguous()
        prob = torch.rand((*rows, k), generator=g)
        prob = 0.8 * prob / prob.sum(-1, keepdim=True)
        flat = index.view(-1, k)
        if k > 2:
            flat[::3, 1] = flat[::3, 0]  # a class that stands twice
            flat[1::4, -1] = -1  # padding
        if flat.shape[0] > 2:
            flat[2] = -100  # a row of padding alone
        return softce.TopK(index, (prob.log() if log else prob).to(dtype), rest, log)

    return make


def mixup(per: str) -> Callable[[Shape, torch.dtype, torch.Generator], softce.Mixup]:
    def make(shape: Shape, dtype: torch.dtype, g: torch.Generator) -> softce.Mixup:
        a, b = some_ignored(shape, dtype, g), indices(shape, dtype, g)
        if b.numel() > 4:
            b.view(-1)[4] = -100  # with a ignored there too: an ignored row
        rows = row_shape(shape)
        lam: float | Tensor = 0.3
        if per == "row":
            lam = torch.rand(rows, generator=g)
        elif per == "sample":
            lam = torch.rand(rows[:1], generator=g)
        return softce.Mixup(a, b, lam)

    return make


def teacher(**arguments: Any) -> Callable[[Shape, torch.dtype, torch.Generator], softce.Teacher]:
    def make(shape: Shape, dtype: torch.dtype, g: torch.Generator) -> softce.Teacher:
        return softce.Teacher((2 * torch.randn(shape, generator=g)).to(dtype), **arguments)

    return make


TARGETS: dict[str, Callable[[Shape, torch.dtype, torch.Generator], Any]] = {
    "indices": indices,
    "ignored": some_ignored,
    "uint8": byte_indices,
    "probs": probabilities,
    "wide_probs": wide_probabilities,
    "unnormalised": unnormalised,
    "topk": top_k("zero"),
    "topk_uniform": top_k("uniform"),
    "topk_renormalize": top_k("renormalize"),
    "topk_log": top_k("zero", log=True),
    "mixup": mixup("number"),
    "mixup_rows": mixup("row"),
    "mixup_samples": mixup("sample"),
    "teacher": teacher(),
    "teacher_t": teacher(temperature=3.0, scale_loss=True),
    "teacher_kl": teacher(temperature=2.0, divergence=True),
}
TORCH_TARGETS = ("indices", "ignored", "uint8", "probs", "wide_probs", "unnormalised")
DENSE_TARGETS = ("probs", "wide_probs", "unnormalised", "teacher", "teacher_t", "teacher_kl")

# ---- memory layouts of the logits and of dense targets ----


def lay_out(x: Tensor, layout: str) -> Tensor:
    """The values of ``x`` in another memory layout (``expanded``: of its first batch item)."""
    if layout == "contiguous" or x.dim() == 0:
        return x
    if layout == "class_last":
        return x.movedim(1, -1).contiguous().movedim(-1, 1) if x.dim() > 2 else x
    if layout == "transposed":
        return x.movedim(0, -1).contiguous().movedim(-1, 0)
    if layout == "expanded":
        return x[:1].expand(x.shape)
    if layout == "expanded_classes":
        return x.narrow(1, 0, 1).expand(x.shape)
    if layout == "padded":  # rows that start at odd offsets of a wider tensor
        wide = x.new_full((*x.shape[:-1], x.shape[-1] + 3), torch.nan)
        wide[..., 1:-2] = x
        return wide[..., 1:-2]
    if layout == "stepped":  # every other element
        wide = x.new_full((*x.shape[:-1], 2 * x.shape[-1]), torch.nan)
        wide[..., ::2] = x
        return wide[..., ::2]
    if layout == "every_other_item":
        wide = x.new_full((2 * x.shape[0], *x.shape[1:]), torch.nan)
        wide[::2] = x
        return wide[::2]
    raise ValueError(f"unknown layout {layout!r}")


LAYOUTS = ("class_last", "transposed", "expanded", "expanded_classes", "padded", "stepped", "every_other_item")


@dataclass(frozen=True)
class Case:
    """One call. ``options`` names an entry of ``OPTIONS``, ``row_loss`` one of ``ROW_LOSSES``."""

    shape: Shape
    target: str = "indices"
    options: str = "plain"
    layout: str = "contiguous"
    weight: bool = False
    row_weight: bool = False
    row_loss: str | None = None

    @property
    def name(self) -> str:
        parts = ["x".join(map(str, self.shape)), self.target, self.options]
        parts += [self.layout] if self.layout != "contiguous" else []
        parts += ["weight"] if self.weight else []
        parts += ["row_weight"] if self.row_weight else []
        parts += [self.row_loss] if self.row_loss else []
        return "-".join(parts)

    @property
    def is_torch(self) -> bool:
        """Whether ``torch.nn.functional.cross_entropy`` takes the same arguments."""
        plain = not self.row_weight and self.row_loss is None
        return plain and self.target in TORCH_TARGETS and set(OPTIONS[self.options]) <= TORCH_OPTIONS

    @property
    def is_dense(self) -> bool:
        return self.target in DENSE_TARGETS

    @property
    def reduction(self) -> str:
        return str(OPTIONS[self.options].get("reduction", "mean"))

    def make(
        self, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32
    ) -> tuple[Tensor, Any, dict[str, Any]]:
        """``(input, target, kwargs)``; the input is a leaf that does not require grad yet."""
        g = torch.Generator().manual_seed(zlib.crc32(self.name.encode()))
        shape, rows, classes = self.shape, row_shape(self.shape), class_count(self.shape)
        class_dim = 0 if len(shape) == 1 else 1
        logits = 3 * torch.randn(shape, generator=g)
        spot = torch.randint(classes, rows, generator=g).unsqueeze(class_dim)
        logits.scatter_add_(class_dim, spot, 14 * torch.randn(spot.shape, generator=g))
        input = lay_out(logits.to(device=device, dtype=dtype), self.layout)

        target = TARGETS[self.target](shape, dtype, g)
        if isinstance(target, Tensor):
            target = target.to(device)
            if target.shape == input.shape and self.layout not in ("expanded", "expanded_classes"):
                target = lay_out(target, self.layout)
        else:
            moved = {k: v.to(device) for k, v in vars(target).items() if isinstance(v, Tensor)}
            target = type(target)(**{**vars(target), **moved})

        kwargs = dict(OPTIONS[self.options])
        if self.weight:
            weight = torch.rand(classes, generator=g) + 0.1
            if classes > 4:
                weight[classes // 2] = 0.0
            kwargs["weight"] = weight.to(device=device, dtype=dtype)
        if self.row_weight:
            weight = torch.rand(rows, generator=g)
            kwargs["row_weight"] = weight.to(device=device, dtype=dtype)
        if self.row_loss:
            kwargs["row_loss"] = ROW_LOSSES[self.row_loss]
        return input, target, kwargs


def cases() -> Iterator[Case]:
    """Every case: all shapes with the common targets, then each dimension of the table on a few shapes."""
    seen = set()
    for case in _cases():
        if case not in seen:
            seen.add(case)
            yield case


def _cases() -> Iterator[Case]:
    for shape in SHAPES:
        for target in ("indices", "ignored", "probs"):
            yield Case(shape, target)
            yield Case(shape, target, "smoothed", weight=True)
        yield Case(shape, "unnormalised", "smoothed_none")
    few, wide, planes = (5, 11), (3, 257), (2, 5, 7)
    for shape in (few, planes):
        for options in OPTIONS:
            for target in ("ignored", "probs"):
                yield Case(shape, target, options)
        for target in TARGETS:
            yield Case(shape, target)
            yield Case(shape, target, "everything", weight=True)
            yield Case(shape, target, "none", weight=True)
        for row_loss in ROW_LOSSES:
            for target in ("ignored", "probs"):
                yield Case(shape, target, row_loss=row_loss)
            yield Case(shape, "indices", "smoothed", row_loss=row_loss, row_weight=True)
        for target in ("ignored", "probs", "mixup"):
            yield Case(shape, target, row_weight=True, weight=True)
            yield Case(shape, target, "everything_none", row_weight=True)
    for target in TARGETS:
        yield Case(wide, target, "smoothed", weight=True)
    for layout in LAYOUTS:
        for shape in (few, wide, (2, 21, 4, 5)):
            for target in ("ignored", "probs"):
                yield Case(shape, target, "smoothed", layout=layout, weight=True)
                yield Case(shape, target, layout=layout)


def torch_cases() -> Iterator[Case]:
    """The cases that torch's own function takes too."""
    return (case for case in cases() if case.is_torch)

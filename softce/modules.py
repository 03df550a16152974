# SPDX-License-Identifier: BSD-3-Clause
"""Modules: they hold arguments and call the functional interface."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from .functional import cross_entropy
from .settings import Stats
from .targets import Target


def keyword_defaults(function: Callable[..., Any], *besides: str) -> dict[str, Any]:
    """The keyword-only arguments of ``function`` and their defaults, without those named in ``besides``."""
    parameters = inspect.signature(function).parameters.values()
    return {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY and p.name not in besides}


def hold_extras(module: nn.Module, known: dict[str, Any], given: dict[str, Any]) -> None:
    """Set every argument of ``known`` as an attribute of ``module``: as given, or its default."""
    for name in given:
        if name not in known:
            raise TypeError(f"{type(module).__name__}: unexpected keyword argument {name!r}; known: {', '.join(known)}")
    for name, default in known.items():
        setattr(module, name, given.get(name, default))


EXTRAS = keyword_defaults(cross_entropy, "row_weight")


class CrossEntropyLoss(nn.CrossEntropyLoss):
    """``torch.nn.CrossEntropyLoss`` on softce; the keyword-only arguments are those of :func:`softce.cross_entropy`.

    ``weight`` is a buffer, and every attribute is read at each call, as in torch.
    """

    def __init__(
        self,
        weight: Tensor | None = None,
        size_average: bool | None = None,
        ignore_index: int = -100,
        reduce: bool | None = None,
        reduction: str = "mean",
        label_smoothing: float = 0.0,
        **extras: Any,
    ) -> None:
        super().__init__(weight, size_average, ignore_index, reduce, reduction, label_smoothing)
        hold_extras(self, EXTRAS, extras)

    def forward(  # type: ignore[override]
        self, input: Tensor, target: Tensor | Target, *, row_weight: Tensor | None = None
    ) -> Tensor | tuple[Tensor, Stats]:
        """The loss of ``input`` against ``target``; ``row_weight`` gives one weight a row."""
        return cross_entropy(
            input,
            target,
            weight=self.weight,
            ignore_index=self.ignore_index,
            reduction=self.reduction,
            label_smoothing=self.label_smoothing,
            row_weight=row_weight,
            **{name: getattr(self, name) for name in EXTRAS},
        )

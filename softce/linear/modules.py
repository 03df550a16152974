# SPDX-License-Identifier: BSD-3-Clause
"""The fused linear loss as a module: it holds the linear layer and the arguments, and calls the function."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from ..modules import hold_extras, keyword_defaults
from ..settings import Stats
from ..targets import Target
from .functional import linear_cross_entropy

# What the module takes from the call, or has arguments of its own for, as torch's module does.
_OWN = ("linear_bias", "weight", "reduction", "ignore_index", "label_smoothing", "row_weight")
EXTRAS = keyword_defaults(linear_cross_entropy, *_OWN)


class LinearCrossEntropyLoss(nn.modules.loss._WeightedLoss):
    """``torch.nn.LinearCrossEntropyLoss`` on softce, with the arguments of :func:`softce.linear_cross_entropy`.

    Args:
        in_features: H, the size of each hidden state.
        num_classes: V.
        out_features: ``(d1, ..)`` of a K-dimensional loss, whose logits are computed as a whole.
        bias: the linear layer has a bias.
        device, dtype: of the linear layer, ``self.linear``.
        reduction, weight, ignore_index, label_smoothing: as in the function; ``weight`` is a buffer.
        extras: the other keyword arguments of the function, among them ``options``.

    Every attribute is read at each call, as in torch. For tied embeddings assign the shared parameter to
    ``self.linear.weight``.

    Raises:
        RuntimeError: a ``weight`` of another shape than ``(V,)``, ``label_smoothing`` out of [0, 1].
        TypeError: an unknown keyword argument.
    """

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        *,
        out_features: tuple[int, ...] = (),
        bias: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        reduction: str = "mean",
        weight: Tensor | None = None,
        ignore_index: int | None = None,
        label_smoothing: float = 0.0,
        **extras: Any,
    ) -> None:
        if weight is not None and weight.shape != (num_classes,):
            raise RuntimeError(f"expected weight shape to be {(num_classes,)}, got {tuple(weight.shape)}")
        if not 0.0 <= label_smoothing <= 1.0:
            raise RuntimeError(f"expected label_smoothing to be in range [0, 1], got {label_smoothing}")
        super().__init__(weight, None, None, reduction)
        self.num_classes = num_classes
        self.out_features = tuple(out_features)
        self.ignore_index = ignore_index
        self.label_smoothing = label_smoothing
        outputs = math.prod(self.out_features, start=num_classes)
        self.linear = nn.Linear(in_features, outputs, bias=bias, device=device, dtype=dtype)
        hold_extras(self, EXTRAS, extras)

    def forward(
        self, input: Tensor, target: Tensor | Target, *, row_weight: Tensor | None = None
    ) -> Tensor | tuple[Tensor, Stats]:
        """The loss of the hidden states ``input`` against ``target``; ``row_weight`` gives one weight a row."""
        weight: Tensor = self.linear.weight
        bias: Tensor | None = self.linear.bias
        if self.out_features:
            weight = weight.reshape(self.num_classes, *self.out_features, self.linear.in_features)
            bias = None if bias is None else bias.reshape(self.num_classes, *self.out_features)
        return linear_cross_entropy(
            input,
            weight,
            target,
            linear_bias=bias,
            weight=self.weight,
            reduction=self.reduction,
            ignore_index=self.ignore_index,
            label_smoothing=self.label_smoothing,
            row_weight=row_weight,
            **{name: getattr(self, name) for name in EXTRAS},
        )

    def extra_repr(self) -> str:
        """As torch's, with the arguments that differ from their defaults."""
        shown = [
            f"in_features={self.linear.in_features}",
            f"num_classes={self.num_classes}",
            f"out_features={self.out_features}",
            f"bias={self.linear.bias is not None}",
            f"reduction={self.reduction}",
            f"ignore_index={self.ignore_index}",
            f"label_smoothing={self.label_smoothing}",
        ]
        held = {name: getattr(self, name) for name in EXTRAS}
        shown += [f"{name}={value!r}" for name, value in held.items() if value != EXTRAS[name]]
        return ", ".join(shown)

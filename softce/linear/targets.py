# SPDX-License-Identifier: BSD-3-Clause
"""Targets of the fused linear losses: the teacher from hidden states, and the forms with the classes last."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from ..arguments import check_number, check_tensor
from ..layout import Layout
from ..targets import ClassIndices, ClassProbabilities, Form, Target, Teacher


@dataclass(frozen=True, eq=False)
class LinearTeacher(Target):
    """Probabilities of a teacher that is known by its last hidden states, ``t = softmax((h W^T + b) / temperature)``.

    Its logits are computed chunk by chunk beside the student's; all of them at once never exist.

    Args:
        hidden: ``(..., G)`` with the row shape of the input in front.
        linear_weight: ``(V, G)``; G may differ from the student's H.
        linear_bias: ``(V,)``.
        temperature: of the teacher; the student's is the loss's ``temperature``.
        scale_loss: multiply the loss by ``temperature ** 2`` (Hinton et al., "Distilling the Knowledge in a Neural
            Network", 2015).
        divergence: subtract the target's entropy: the loss is KL(t || p). Costs the teacher's product once more.

    Tensors that require grad get one, from the plain formula on each chunk; pass detached ones for a fixed teacher.
    Errors: RuntimeError for shapes, dtypes and devices that do not fit, ValueError for a temperature that is not
    positive.
    """

    hidden: Tensor
    linear_weight: Tensor
    linear_bias: Tensor | None = None
    temperature: float = 1.0
    scale_loss: bool = False
    divergence: bool = False

    def __post_init__(self) -> None:
        check_number("LinearTeacher: temperature", self.temperature)
        if not 0 < self.temperature < math.inf:
            raise ValueError(f"LinearTeacher: temperature must be positive, got {self.temperature}")
        check_linear("LinearTeacher.", "hidden", self.hidden, self.linear_weight, self.linear_bias)

    def check(self, input: Tensor, ignore_index: int) -> None:
        rows = (input.shape[0], *input.shape[2:]) if input.dim() > 1 else ()
        classes = input.shape[1] if input.dim() > 1 else input.shape[0]
        check_rows("LinearTeacher.hidden", tuple(self.hidden.shape[:-1]), rows)
        if self.linear_weight.shape[0] != classes:
            raise RuntimeError(
                f"LinearTeacher: expected linear_weight of {classes} classes, got {list(self.linear_weight.shape)}"
            )
        if self.hidden.device != input.device:
            raise RuntimeError(
                f"Expected LinearTeacher.hidden on the input's device {input.device}, got {self.hidden.device}"
            )

    def dtype(self, input: Tensor) -> torch.dtype:
        return torch.promote_types(input.dtype, self.hidden.dtype)

    def teacher(self) -> Teacher:
        """The same target with its logits in memory, classes in dimension 1."""
        logits = class_first(F.linear(self.hidden, self.linear_weight, self.linear_bias))
        return Teacher(logits, self.temperature, self.scale_loss, self.divergence)

    def kernel_form(self, layout: Layout, acc: torch.dtype, logits_dtype: torch.dtype, ignore_index: int) -> Form:
        return self.teacher().kernel_form(layout, acc, logits_dtype, ignore_index)


def class_first(x: Tensor) -> Tensor:
    """``(N, d1, .., C)`` as ``(N, C, d1, ..)``, a view."""
    return x.movedim(-1, 1) if x.dim() > 2 else x


def check_rows(name: str, got: tuple[int, ...], want: tuple[int, ...]) -> None:
    """Raise as torch does if a target's row shape is not the input's."""
    if got == want:
        return
    if got[:1] != want[:1]:
        raise ValueError(
            f"Expected input batch_size ({want[0] if want else 1}) to match target batch_size ({got[0] if got else 1}"
            f"): {name} must have row shape {list(want)}, got {list(got)}"
        )
    raise RuntimeError(f"Expected target size {list(want)}, got {list(got)} ({name})")


def check_linear(owner: str, name: str, input: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    """Raise for tensors of a linear map that do not fit together."""
    given = ((name, input), ("linear_weight", weight), ("linear_bias", bias))
    for what, x in given:
        if x is None and what == "linear_bias":
            continue
        check_tensor(f"{owner}{what}", x)
        assert x is not None
        if not x.is_floating_point():
            # torch's softmax is what has no implementation for such an input
            error = NotImplementedError if what == "input" else RuntimeError
            raise error(f"Expected floating point type for {owner}{what}, got {x.dtype}")
        if x.device != input.device:
            raise RuntimeError(f"Expected {owner}{what} on the device of {name}, {input.device}, got {x.device}")
    if input.dim() < 1:
        raise RuntimeError(f"expected {owner}{name} of shape (.., H), got a scalar")
    if weight.dim() < 2:
        raise RuntimeError(f"expected {owner}linear_weight with dimensionality at least 2, got {weight.dim()}")
    if input.shape[-1] != weight.shape[-1]:
        raise RuntimeError(
            f"expected equal {owner}{name} and {owner}linear_weight last dimensions (in_features), got "
            f"{input.shape[-1]} and {weight.shape[-1]}, respectively"
        )
    if bias is not None and bias.shape != weight.shape[:-1]:
        raise RuntimeError(f"expected {owner}linear_bias shape {tuple(weight.shape[:-1])}, got {tuple(bias.shape)}")


def as_form(target: Tensor | Target, rows: tuple[int, ...], classes: int) -> Target:
    """The target form of what the caller gave for rows of shape ``rows``: classes last there, in dimension 1 here."""
    if isinstance(target, Tensor):
        if tuple(target.shape) == (*rows, classes):
            return ClassProbabilities(class_first(target))
        if target.is_floating_point():
            if tuple(target.shape) == rows:
                raise RuntimeError(
                    f"expected target dtype to be Long or Byte, but got {target.dtype}: a target of the rows' shape "
                    f"holds class indices; class probabilities have shape {[*rows, classes]}"
                )
            check_rows("target with class probabilities, without its last dimension", tuple(target.shape[:-1]), rows)
            raise RuntimeError(
                f"Expected target size {[*rows, classes]}, got {list(target.shape)}: class probabilities must have the "
                "logits' shape"
            )
        if not (rows == () and target.shape == (1,)):
            check_rows("target", tuple(target.shape), rows)
        return ClassIndices(target)
    if isinstance(target, Teacher):
        if tuple(target.logits.shape) != (*rows, classes):
            check_rows("Teacher.logits without its last dimension", tuple(target.logits.shape[:-1]), rows)
            raise RuntimeError(f"Teacher: expected logits of shape {[*rows, classes]}, got {list(target.logits.shape)}")
        return replace(target, logits=class_first(target.logits))
    if isinstance(target, Target):
        return target
    raise TypeError(f"linear_cross_entropy: target must be a Tensor or a softce target, not {type(target).__name__}")

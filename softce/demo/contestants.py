# SPDX-License-Identifier: BSD-3-Clause
"""The losses that the language-model demo trains with. A new one is one line here."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch.nn.functional as F
from torch import Tensor

import softce


@dataclass(frozen=True)
class Contestant:
    """A way to the loss. ``fused`` takes ``(hidden, head, target)``, others ``(logits, target)``."""

    name: str
    label: str
    loss: Callable[..., Tensor]
    fused: bool = False


def _softce(logits: Tensor, target: Tensor, inplace: bool = False) -> Tensor:
    loss = softce.cross_entropy(logits, target, options=softce.Options(inplace=inplace))
    assert isinstance(loss, Tensor)
    return loss


def contestants() -> dict[str, Contestant]:
    """All that this installation has, torch's first: the others are compared with it."""
    found = [
        Contestant("torch", "F.cross_entropy", F.cross_entropy),
        Contestant("softce", "softce.cross_entropy", _softce),
        Contestant("softce-inplace", "softce, in place", partial(_softce, inplace=True)),
    ]
    linear = getattr(softce, "linear_cross_entropy", None)
    if linear is not None:
        found.append(Contestant("softce-linear", "softce.linear_cross_entropy", linear, fused=True))
    return {contestant.name: contestant for contestant in found}


def default_names() -> list[str]:
    """The lines of the table: torch's loss, softce's, and the fused linear loss where it exists."""
    return [name for name in contestants() if name != "softce-inplace"]

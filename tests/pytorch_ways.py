# SPDX-License-Identifier: BSD-3-Clause
"""The two ways in which PyTorch's own tests reach softce: by its names and, installed, by torch's."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import softce

pytest.importorskip("expecttest", reason="torch.testing._internal imports it")
with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of what torch's own test helpers import
    from torch.testing._internal.common_nn import loss_reference_fns

REFERENCE: Callable[..., Tensor] = loss_reference_fns["CrossEntropyLoss"]
WAYS = ["softce", "installed"]


class Way:
    """A function and a module to test: softce's own, or torch's with softce installed underneath."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.function: Callable[..., Any] = (
            softce.cross_entropy if name == "softce" else torch.nn.functional.cross_entropy
        )
        self.module: type[nn.CrossEntropyLoss] = softce.CrossEntropyLoss if name == "softce" else nn.CrossEntropyLoss


@contextlib.contextmanager
def take(name: str) -> Iterator[Way]:
    """The way of this name; softce is installed as long as it needs that."""
    with softce.installed() if name == "installed" else contextlib.nullcontext():
        yield Way(name)


@contextlib.contextmanager
def softce_off(way: Way) -> Iterator[None]:
    """Torch's own implementation, whatever is installed."""
    if way.name == "installed":
        softce.uninstall()
    try:
        yield
    finally:
        if way.name == "installed":
            softce.install()

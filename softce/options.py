# SPDX-License-Identifier: BSD-3-Clause
"""Mechanics of a call, apart from its meaning: no option here changes a result beyond rounding."""

from __future__ import annotations

from dataclasses import dataclass

from .arguments import check_number

BACKENDS = ("auto", "reference", "cpu", "triton", "cuda")


@dataclass(frozen=True)
class Options:
    """How a loss is computed.

    Args:
        backend: ``"auto"`` takes the fastest backend that can run the call and falls back to the plain PyTorch
            formula; ``"reference"``, ``"cpu"``, ``"triton"`` or ``"cuda"`` take that one or raise ``RuntimeError``
            with the reasons why it cannot run.
        inplace: write the gradient over the logits' memory. Nothing of the size of the logits is allocated. The
            logits' values are lost: whatever autograd saved of them before, or would need of them later, raises.
        explain: warn with the reasons whenever ``"auto"`` had to fall back to the plain PyTorch formula.
        memory_budget: bytes that a fused linear loss may use for its chunk of logits; ``None`` chooses.
        validate: look at the data of CPU tensors for what cannot have been meant, such as negative probabilities or
            a softmax output passed as logits, and warn (:mod:`softce.validate` says at what cost).

    Raises:
        ValueError: an unknown backend, or a budget that is not positive.
    """

    backend: str = "auto"
    inplace: bool = False
    explain: bool = False
    memory_budget: int | None = None
    validate: bool = True

    def __post_init__(self) -> None:
        if self.backend not in BACKENDS:
            raise ValueError(f"Options: backend must be one of {', '.join(BACKENDS)}, got {self.backend!r}")
        if self.memory_budget is not None:
            check_number("Options: memory_budget", self.memory_budget, integral=True)
            if self.memory_budget <= 0:
                raise ValueError(f"Options: memory_budget must be a positive number of bytes, got {self.memory_budget}")


DEFAULT = Options()

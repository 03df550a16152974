# SPDX-License-Identifier: BSD-3-Clause
"""One adapter a contestant: why it cannot run here, and the call that is timed.

End to end is ``loss = f(x, t); loss.backward()`` with ``x`` a leaf: the allocation of the gradient is inside, its
release (``x.grad = None``) is not.
"""

from __future__ import annotations

import importlib.util
import shutil
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .calm import SPIN, Spin
from .cases import Case, Inputs
from .timer import Entry

INPLACE_FROM = 1 << 20
BARE = ("memcpy", SPIN)  # measures of the machine, not losses


def softce_module() -> ModuleType | None:
    """The installed softce, or None where it has no ``cross_entropy``."""
    if importlib.util.find_spec("softce") is None:
        return None
    module = importlib.import_module("softce")
    return module if hasattr(module, "cross_entropy") else None


def no_compiler(case: object) -> list[str]:
    if any(shutil.which(name) for name in ("c++", "g++", "clang++")):
        return []
    return ["torch.compile needs a C++ compiler on the PATH"]


def no_softce(case: object) -> list[str]:
    """Without its compiled library softce falls back to plain PyTorch, which would be measured as softce."""
    if softce_module() is None:
        return ["softce.cross_entropy cannot be imported"]
    reason = importlib.import_module("softce._library").CPU.reason()
    return [] if reason is None else [f"softce's CPU kernels cannot be used: {reason}"]


def compiled(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """``function`` under torch.compile, from a clean slate: no graph of an earlier case is kept or reused.

    ``fullgraph``: a contestant that falls back to eager in part would otherwise be reported as compiled.
    """
    torch._dynamo.reset()
    return torch.compile(function, fullgraph=True, dynamic=False)


def no_recompiles(names: Sequence[str]) -> AbstractContextManager[object]:
    """Makes a second compilation of the same call an error, for the same reason, where ``compile`` takes part."""
    if "compile" not in names:
        return nullcontext()
    return torch._dynamo.config.patch(error_on_recompile=True)


@dataclass(frozen=True)
class Adapter:
    """A contestant: ``build(name, inputs)`` makes its entry; ``reasons(case)`` is empty where it can run."""

    name: str
    label: str
    build: Callable[[str, Any], Entry]
    reasons: Callable[[Any], list[str]] = lambda case: []


def end_to_end(name: str, loss: Callable[..., Tensor], inputs: Inputs) -> Entry:
    """The entry of any loss with the signature of ``F.cross_entropy``."""
    x, target, kwargs = inputs.logits, inputs.target, inputs.kwargs

    def run() -> Tensor:
        x.grad = None  # repeated calls of one sample must not accumulate
        value = loss(x, target, **kwargs)
        value.backward()
        return value.detach()

    def release() -> None:
        x.grad = None

    return Entry(name, run, before=release, after=release, gradient=lambda: x.grad)


def _eager(name: str, inputs: Inputs) -> Entry:
    return end_to_end(name, F.cross_entropy, inputs)


def _compile(name: str, inputs: Inputs) -> Entry:
    kwargs = inputs.kwargs

    # The arguments are constants of the graph, as in a training script.
    def loss(x: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(x, target, **kwargs)

    bare = compiled(loss)
    return end_to_end(name, lambda x, target, **_: bare(x, target), inputs)


def _memcpy(name: str, inputs: Inputs) -> Entry:
    source = inputs.logits.detach()
    buffer = torch.zeros_like(source)
    return Entry(name, lambda: buffer.copy_(source))


def _spin(name: str, inputs: Inputs) -> Entry:
    return Entry(name, Spin())


def _softce(name: str, inputs: Inputs) -> Entry:
    softce = softce_module()
    assert softce is not None
    return end_to_end(name, softce.cross_entropy, inputs)


def _softce_inplace(name: str, inputs: Inputs) -> Entry:
    """In place the logits are lost, so each sample starts from a fresh copy of them, made outside the timing: the
    writing back of what the copy has left in the caches too, or a part of the copy would be timed.

    A leaf cannot be overwritten: here the logits come from a producer that allocates nothing and takes the gradient,
    the part that a model's last layer has. They are there before the timing begins, as every other contestant's are.
    """
    softce = softce_module()
    assert softce is not None
    options = softce.Options(inplace=True)
    original = inputs.logits.detach()
    memory = original.clone()
    anchor = torch.zeros((), requires_grad=True)
    taken: list[Tensor] = []
    made: list[Tensor] = []

    class Producer(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, anchor: Tensor) -> Tensor:  # type: ignore[override]
            # The same memory, but no view of `memory`: a view made here could not be written to.
            fresh = torch.empty(0, dtype=memory.dtype)
            return fresh.set_(memory.untyped_storage(), 0, memory.shape, memory.stride())

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> None:  # type: ignore[override]
            taken[:] = [grad]

    def before() -> None:
        taken.clear()
        memory.copy_(original)
        made[:] = [Producer.apply(anchor)]
        original.sum()  # takes the copy's place in the caches, and need not be written back

    def run() -> Tensor:
        logits = made.pop() if made else Producer.apply(anchor)  # of several short calls a sample, the later ones
        value = softce.cross_entropy(logits, inputs.target, **inputs.kwargs, options=options)
        value.backward()
        return value.detach()

    return Entry(name, run, before=before, gradient=lambda: taken[0])


def _inplace_reasons(case: Case) -> list[str]:
    reasons = no_softce(case)
    if case.elements < INPLACE_FROM:
        reasons.append(f"in place is measured from {INPLACE_FROM} elements on: a sample holds one call only")
    return reasons


def registry(*adapters: Adapter) -> dict[str, Adapter]:
    return {adapter.name: adapter for adapter in adapters}


ADAPTERS = registry(
    Adapter("memcpy", "memcpy of the logits", _memcpy),
    Adapter(SPIN, "a fixed loop of arithmetic", _spin),
    Adapter("eager", "torch eager", _eager),
    Adapter("compile", "torch.compile", _compile, no_compiler),
    Adapter("softce", "softce", _softce, no_softce),
    Adapter("softce-inplace", "softce in place", _softce_inplace, _inplace_reasons),
)


def entries(
    names: Iterable[str], inputs: Any, adapters: dict[str, Adapter] = ADAPTERS
) -> tuple[list[Entry], dict[str, str]]:
    """The entries of the contestants that can run ``inputs``, and for each of the others why it cannot."""
    found: list[Entry] = []
    skipped: dict[str, str] = {}
    for name in names:
        reasons = adapters[name].reasons(inputs.case)
        if reasons:
            skipped[name] = "; ".join(reasons)
        else:
            found.append(adapters[name].build(name, inputs))
    return found, skipped

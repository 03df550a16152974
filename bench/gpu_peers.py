# SPDX-License-Identifier: BSD-3-Clause
"""The contestants on a GPU: why one cannot run here, and the call that is timed.

Every call is forward and backward of a mean, from logits (or from hidden states) to their gradients, its allocations
included. A peer is found by its package; ``calls`` builds what runs from the function that the package documents.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

Call = Callable[[], Any]


@dataclass(frozen=True)
class Peer:
    """``build(*inputs)`` gives the call. ``overwrites``: it writes over the logits, which are restored untimed."""

    name: str
    label: str
    package: str | None  # what has to be importable; None: always there
    build: Callable[..., Call]
    overwrites: bool = False
    backend: str | None = None  # a GPU backend of softce that has to be usable

    def reasons(self) -> list[str]:
        """Why it cannot run here; empty if it can."""
        if self.backend is not None:
            from softce import backends

            return list(backends.unavailable(self.backend))
        if self.package is not None and importlib.util.find_spec(self.package.split(".")[0]) is None:
            return [f"{self.package.split('.')[0]} is not installed"]
        try:
            if self.package is not None:
                importlib.import_module(self.package)
        except Exception as error:  # a peer may break at import in any way
            return [f"{self.package} cannot be imported: {type(error).__name__}: {error}"]
        return []

    @property
    def version(self) -> str | None:
        if self.package is None:
            return None
        names = importlib.metadata.packages_distributions().get(self.package.split(".")[0], [])
        return importlib.metadata.version(names[0]) if names else None


def forward_backward(function: Callable[..., Tensor], leaves: tuple[Tensor, ...], *arguments: Any) -> Call:
    """``function(*leaves, *arguments).backward()`` with fresh gradients each time."""
    for leaf in leaves:
        leaf.requires_grad_()

    def call() -> tuple[Tensor, tuple[Tensor | None, ...]]:
        for leaf in leaves:
            leaf.grad = None
        loss = function(*leaves, *arguments)
        loss.backward()
        return loss.detach(), tuple(leaf.grad for leaf in leaves)

    return call


def compiled(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Under torch.compile, from a clean slate; a graph break raises."""
    torch._dynamo.reset()
    return torch.compile(function, fullgraph=True, dynamic=False)


def _softce(backend: str) -> Callable[[Tensor, Tensor], Call]:
    def build(logits: Tensor, target: Tensor) -> Call:
        import softce
        from softce.backends import gpu

        run = forward_backward(softce.cross_entropy, (logits,), target)

        def call() -> Any:
            with gpu.forced(backend):
                return run()

        return call

    return build


def _torch_loss(x: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(x, target)


def _liger(logits: Tensor, target: Tensor) -> Call:
    from liger_kernel.transformers.functional import liger_cross_entropy

    return forward_backward(liger_cross_entropy, (logits,), target)


def _quack(logits: Tensor, target: Tensor) -> Call:
    from quack.cross_entropy import cross_entropy

    return forward_backward(cross_entropy, (logits,), target)


def _flash(logits: Tensor, target: Tensor) -> Call:
    from flash_attn.ops.triton.cross_entropy import cross_entropy_loss

    return forward_backward(lambda x, t: cross_entropy_loss(x, t)[0].mean(), (logits,), target)


INDICES = (
    Peer("eager", "torch eager", None, lambda x, t: forward_backward(_torch_loss, (x,), t)),
    Peer("compile", "torch.compile", None, lambda x, t: forward_backward(compiled(_torch_loss), (x,), t)),
    Peer("liger", "Liger", "liger_kernel.transformers.functional", _liger, overwrites=True),
    Peer("quack", "quack", "quack.cross_entropy", _quack),
    Peer("flash-attn", "flash-attn", "flash_attn.ops.triton.cross_entropy", _flash),
    Peer("softce-triton", "softce, Triton", None, _softce("triton"), backend="triton"),
    Peer("softce-cuda", "softce, CUDA C++", None, _softce("cuda"), backend="cuda"),
)
# No peer but torch has dense soft targets.
DENSE = tuple(peer for peer in INDICES if peer.name in ("eager", "compile", "softce-triton", "softce-cuda"))


# ---- from hidden states: (input, linear_weight, target) ----


def _linear_loss(x: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(x, weight), target)


def _gemms(x: Tensor, weight: Tensor, target: Tensor) -> Call:
    """The three matrix products alone: the least that any implementation does."""
    logits = torch.empty(x.shape[0], weight.shape[0], dtype=x.dtype, device=x.device)
    dx, dweight = torch.empty_like(x), torch.empty_like(weight)

    def call() -> None:
        torch.mm(x, weight.t(), out=logits)
        torch.mm(logits, weight, out=dx)
        torch.mm(logits.t(), x, out=dweight)

    return call


def _softce_linear(x: Tensor, weight: Tensor, target: Tensor) -> Call:
    import softce

    return forward_backward(softce.linear_cross_entropy, (x, weight), target)


def _liger_linear(x: Tensor, weight: Tensor, target: Tensor) -> Call:
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    return forward_backward(liger_fused_linear_cross_entropy, (x, weight), target)


def _cce(x: Tensor, weight: Tensor, target: Tensor) -> Call:
    from cut_cross_entropy import linear_cross_entropy

    return forward_backward(linear_cross_entropy, (x, weight), target)


def _quack_linear(x: Tensor, weight: Tensor, target: Tensor) -> Call:
    from quack.linear_cross_entropy import chunked_linear_cross_entropy

    return forward_backward(chunked_linear_cross_entropy, (x, weight), target)


LINEAR = (
    Peer("gemms", "the three GEMMs alone", None, _gemms),
    Peer("eager", "torch eager", None, lambda x, w, t: forward_backward(_linear_loss, (x, w), t)),
    Peer("compile", "torch.compile", None, lambda x, w, t: forward_backward(compiled(_linear_loss), (x, w), t)),
    Peer("liger", "Liger", "liger_kernel.transformers.functional", _liger_linear),
    Peer("cce", "cut-cross-entropy", "cut_cross_entropy", _cce),
    Peer("quack", "quack", "quack.linear_cross_entropy", _quack_linear),
    Peer("softce", "softce", "softce", _softce_linear),
)

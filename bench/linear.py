# SPDX-License-Identifier: BSD-3-Clause
"""The linear suite: ``loss(input @ linear_weight.T, target)`` with gradients for input and weight.

The limit is the three matrix products alone (logits, dinput, dweight) into buffers that exist already: 6*N*H*V
operations. Every contestant allocates its gradients; the products alone do not.
"""

from __future__ import annotations

import functools
import importlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .accuracy import gradient_limit
from .adapters import Adapter, compiled, entries, no_compiler, no_recompiles, no_softce, registry
from .cases import DTYPES, KINDS
from .measure import Progress, Record, ignore, record_of
from .timer import Entry, describe, interleave

CHUNKS = (64, 128, 256, 512, 1024)
BUDGET = 16 << 20
ENTRIES = 16  # K of top-k
LAM = 0.7
ACCURATE_CLASSES = 4096  # rows of dweight that are held against float64


@dataclass(frozen=True)
class LinearCase:
    """Input (N, H), linear_weight (V, H), and a target of one kind over V classes."""

    rows: int
    hidden: int
    classes: int
    dtype: str = "float32"
    kind: str = "hard"

    @property
    def id(self) -> str:
        return f"{self.label}-{self.dtype}-{self.kind}"

    @property
    def label(self) -> str:
        return f"{self.rows}x{self.hidden}x{self.classes}"

    @property
    def gradient_bytes(self) -> int:
        return (self.rows + self.classes) * self.hidden * DTYPES[self.dtype].itemsize

    @property
    def flops(self) -> int:
        return 6 * self.rows * self.hidden * self.classes


@dataclass
class LinearInputs:
    """``target`` in softce's form; ``index`` and ``value`` (N, K) say the same, where it is not dense."""

    case: LinearCase
    input: Tensor
    linear_weight: Tensor
    target: Any
    index: Tensor | None = None
    value: Tensor | None = None

    @property
    def kwargs(self) -> dict[str, float]:
        return KINDS[self.case.kind].kwargs if self.case.kind in KINDS else {}


def make_inputs(case: LinearCase, seed: int = 0) -> LinearInputs:
    """Normal hidden states and a weight scaled so that the logits have standard deviation 2."""
    generator = torch.Generator().manual_seed(seed)
    dtype = DTYPES[case.dtype]
    hidden = torch.empty(case.rows, case.hidden).normal_(generator=generator).to(dtype).requires_grad_()
    weight = torch.empty(case.classes, case.hidden).normal_(std=2.0 / case.hidden**0.5, generator=generator)
    inputs = LinearInputs(case, hidden, weight.to(dtype).requires_grad_(), None)
    shape = (case.rows, case.classes)
    if case.kind in KINDS:
        inputs.target = KINDS[case.kind].make(shape, dtype, generator)
        if not KINDS[case.kind].dense:
            inputs.index, inputs.value = inputs.target.unsqueeze(1), torch.ones(case.rows, 1)
    else:
        softce = importlib.import_module("softce")
        entries = 2 if case.kind == "mixup" else min(ENTRIES, case.classes)
        # Different classes a row: a random start and a stride.
        start = torch.randint(case.classes, (case.rows, 1), generator=generator)
        index = (start + torch.arange(entries) * (case.classes // entries)) % case.classes
        if case.kind == "mixup":
            value = torch.tensor([LAM, 1 - LAM]).expand(case.rows, 2)
            inputs.target = softce.Mixup(index[:, 0], index[:, 1], LAM)
        else:
            value = torch.empty(index.shape).normal_(generator=generator).softmax(1)
            inputs.target = softce.TopK(index, value)
        inputs.index, inputs.value = index, value
    return inputs


Loss = Callable[[Tensor, Tensor, Any], Tensor]


def _plain(inputs: LinearInputs) -> Loss:
    """The loss over all logits, written as its users write it today."""
    kwargs, index, value = inputs.kwargs, inputs.index, inputs.value

    if inputs.case.kind == "mixup":
        assert index is not None
        first, second = index.unbind(1)

        def mixup(hidden: Tensor, weight: Tensor, target: Any) -> Tensor:
            logits = F.linear(hidden, weight)
            return LAM * F.cross_entropy(logits, first) + (1 - LAM) * F.cross_entropy(logits, second)

        return mixup
    if inputs.case.kind == "topk":

        def topk(hidden: Tensor, weight: Tensor, target: Any) -> Tensor:
            return -(value * F.linear(hidden, weight).log_softmax(1).gather(1, index)).sum(1).mean()

        return topk

    def loss(hidden: Tensor, weight: Tensor, target: Any) -> Tensor:
        return F.cross_entropy(F.linear(hidden, weight), target, **kwargs)

    return loss


def _compile(inputs: LinearInputs) -> Loss:
    return compiled(_plain(inputs))


def _chunked(inputs: LinearInputs, **options: Any) -> Loss:
    chosen = torch.nn.LinearCrossEntropyOptions(**options)
    return functools.partial(F.linear_cross_entropy, options=chosen, **inputs.kwargs)


def _chunked_best(inputs: LinearInputs) -> Loss:
    """The chunk that one call each finds fastest, after a call to warm up."""
    best, best_time = CHUNKS[0], float("inf")
    for chunk in CHUNKS:
        if chunk > inputs.case.rows:
            continue
        entry = end_to_end("probe", _chunked(inputs, batch_chunk_size=chunk), inputs)
        for timed in (False, True):
            entry.before()
            start = time.perf_counter()
            entry.run()
            elapsed = time.perf_counter() - start
            entry.after()
            if timed and elapsed < best_time:
                best, best_time = chunk, elapsed
    loss = _chunked(inputs, batch_chunk_size=best)
    loss.note = f"{best} rows a chunk"  # type: ignore[attr-defined]
    return loss


def _softce(inputs: LinearInputs, **options: Any) -> Loss:
    softce = importlib.import_module("softce")
    kwargs = {**inputs.kwargs, **({"options": softce.Options(**options)} if options else {})}
    return functools.partial(softce.linear_cross_entropy, **kwargs)


def end_to_end(name: str, loss: Loss, inputs: LinearInputs) -> Entry:
    leaves = (inputs.input, inputs.linear_weight)

    def release() -> None:
        for leaf in leaves:
            leaf.grad = None

    def run() -> Tensor:
        release()
        value = loss(*leaves, inputs.target)
        value.backward()
        return value.detach()

    return Entry(name, run, before=release, after=release, note=getattr(loss, "note", ""))


def _gemms(name: str, inputs: LinearInputs) -> Entry:
    x, w = inputs.input.detach(), inputs.linear_weight.detach()
    logits = torch.zeros(x.shape[0], w.shape[0], dtype=x.dtype)
    dinput, dweight = torch.zeros_like(x), torch.zeros_like(w)

    def run() -> None:
        torch.mm(x, w.t(), out=logits)
        torch.mm(logits, w, out=dinput)
        torch.mm(logits.t(), x, out=dweight)

    return Entry(name, run)


def _no_linear(case: LinearCase) -> list[str]:
    reasons = no_softce(case)
    if not reasons and not hasattr(importlib.import_module("softce"), "linear_cross_entropy"):
        reasons.append("softce has no linear_cross_entropy")
    return reasons


def _no_chunked(case: LinearCase) -> list[str]:
    if not hasattr(torch.nn, "LinearCrossEntropyOptions"):
        return [f"torch {torch.__version__} has no chunked linear_cross_entropy"]
    if case.kind != "hard":
        return [f"torch's chunked path computes the full logits for {case.kind} targets"]
    return []


def _by_loss(make: Callable[[LinearInputs], Loss]) -> Callable[[str, LinearInputs], Entry]:
    return lambda name, inputs: end_to_end(name, make(inputs), inputs)


ADAPTERS = registry(
    Adapter("gemms", "the three matrix products alone", _gemms),
    Adapter("eager", "F.linear + F.cross_entropy", _by_loss(_plain)),
    Adapter("compile", "the same under torch.compile", _by_loss(_compile), no_compiler),
    Adapter("chunked", "torch's chunked path, its defaults", _by_loss(_chunked), _no_chunked),
    Adapter("chunked-best", "torch's chunked path, best chunk", _by_loss(_chunked_best), _no_chunked),
    Adapter("softce", "softce", _by_loss(_softce), _no_linear),
    Adapter(
        "softce-16MiB", "softce within 16 MiB", _by_loss(functools.partial(_softce, memory_budget=BUDGET)), _no_linear
    ),
)


def gradients(inputs: LinearInputs) -> tuple[Tensor, Tensor]:
    """``dinput`` and the first rows of ``dweight`` of the mean loss in float64, written out from the definition."""
    case = inputs.case
    x, w = inputs.input.detach().double(), inputs.linear_weight.detach().double()
    grad = x @ w.t()
    grad = grad.softmax(1)
    smoothing = KINDS[case.kind].smoothing if case.kind in KINDS else 0.0
    if inputs.index is not None and inputs.value is not None:
        value = inputs.value.double()
        grad *= (value.sum(1, keepdim=True)) * (1 - smoothing) + smoothing
        grad.scatter_add_(1, inputs.index, -(1 - smoothing) * value)
    else:
        grad *= inputs.target.double().sum(1, keepdim=True) * (1 - smoothing) + smoothing
        grad.sub_(inputs.target, alpha=1 - smoothing)
    grad = grad.sub_(smoothing / case.classes).div_(case.rows)
    return grad @ w, grad[:, :ACCURATE_CLASSES].t() @ x


def _relative(found: Tensor, truth: Tensor) -> float:
    return float((found.double() - truth).norm() / truth.norm())


def check(inputs: LinearInputs, found: Sequence[Entry]) -> tuple[dict[str, Record], dict[str, str]]:
    """Gradient errors of the entries worth a reference of three float64 products, and those that are wrong."""
    dinput, dweight = gradients(inputs)
    dtype = inputs.input.dtype
    rounding = max(_relative(truth.to(dtype), truth) for truth in (dinput, dweight))
    limit = gradient_limit(dtype)
    measured: dict[str, Record] = {}
    wrong: dict[str, str] = {}
    for entry in found:
        if not entry.name.startswith(("softce", "eager")):
            continue
        try:
            entry.before()
            entry.run()
            assert inputs.input.grad is not None and inputs.linear_weight.grad is not None
            error = max(
                _relative(inputs.input.grad, dinput),
                _relative(inputs.linear_weight.grad[:ACCURATE_CLASSES], dweight),
            )
        except Exception as failure:
            wrong[entry.name] = describe(failure)
            continue
        entry.after()
        measured[entry.name] = {"gradient_error": error, "gradient_error_over_rounding": error / max(rounding, 1e-30)}
        if not error <= limit and entry.name != "eager":
            wrong[entry.name] = f"wrong gradient: relative error {error:.1e} against float64, limit {limit:.1e}"
    return measured, wrong


def time_case(
    case: LinearCase, names: Sequence[str], *, seconds: float, threads: int = 1, progress: Progress = ignore
) -> Record:
    """Times the contestants ``names`` on ``case``, as ``measure.time_case`` but five times as long."""
    torch.set_num_threads(threads)
    inputs = make_inputs(case)
    found, skipped = entries(names, inputs, ADAPTERS)
    with no_recompiles(names):
        samples = interleave(found, seconds=5 * seconds, min_rounds=3, on_round=progress)
        measured, wrong = check(inputs, [entry for entry in found if samples[entry.name].error is None])
    record = record_of("linear", case, samples, skipped, wrong, threads=threads, flops=case.flops)
    for name, result in record["results"].items():
        result.update(measured.get(name, {}))
    return record


KINDS_MEASURED = ("hard", "smoothed", "mixup", "topk", "soft", "soft+smoothed")
WANTED = (1024, 512)  # N, H of the figures to reach


def all_cases(quick: bool = False) -> list[LinearCase]:
    """Every case of the linear section. The shapes besides the wanted ones are there to catch a bad chunk choice."""
    if quick:
        return [
            LinearCase(128, 64, 8192, dtype, kind) for dtype in DTYPES for kind in ("hard", "topk", "soft+smoothed")
        ]
    found = [LinearCase(*WANTED, classes, kind=kind) for classes in (32768, 131072) for kind in KINDS_MEASURED]
    found += [LinearCase(*shape) for shape in ((1024, 512, 8192), (256, 512, 32768), (4096, 256, 8192))]
    found += [LinearCase(*WANTED, 32768, "bfloat16", kind) for kind in ("hard", "soft+smoothed")]
    return found

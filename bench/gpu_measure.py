# SPDX-License-Identifier: BSD-3-Clause
"""Times the contestants on a GPU: interleaved, with events, the L2 cache scrubbed, checked against float64 first.

Bandwidth counts the least bytes that a call has to move, whatever it does move: one read of the logits and one write of
their gradient for class indices, another read for a dense target. The copy that it is compared with runs in the same
rounds: ``copy_`` of the logits, one read and one write.
"""

from __future__ import annotations

import gc
import random
import statistics
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .gpu_peers import DENSE, INDICES, LINEAR, Call, Peer

SCRUB_BYTES = 512 << 20  # beyond any L2
SECONDS = 2.0  # of timed calls a contestant


class Shape(NamedTuple):
    """A measurement: what kind, on which sizes."""

    section: str  # "indices", "dense" or "linear"
    rows: int
    classes: int
    hidden: int = 0
    dtype: str = "bfloat16"

    @property
    def name(self) -> str:
        hidden = f" from {self.hidden}" if self.hidden else ""
        return f"({self.rows}, {self.classes}){hidden} {self.dtype} {self.section}"

    @property
    def least_bytes(self) -> int:
        """What a loss on logits has to move: 2 passes for class indices, 3 for a dense target."""
        element = getattr(torch, self.dtype).itemsize
        return (3 if self.section == "dense" else 2) * self.rows * self.classes * element

    @property
    def copy_bytes(self) -> int:
        return 2 * self.rows * self.classes * getattr(torch, self.dtype).itemsize


FIGURES = ((8192, 32768), (8192, 128256), (4096, 256000))
SHAPES = (
    *(Shape("indices", *sizes) for sizes in FIGURES),
    *(Shape("dense", *sizes) for sizes in FIGURES),
    Shape("indices", 32768, 1000),
    Shape("indices", 8192, 50257),
    Shape("indices", 8192, 128256, dtype="float32"),
    Shape("dense", 32768, 1000),
    Shape("linear", 8192, 128256, 4096),
)
QUICK = (Shape("indices", 512, 4096), Shape("dense", 512, 4096), Shape("linear", 256, 4096, 128))
PEERS = {"indices": INDICES, "dense": DENSE, "linear": LINEAR}


def make_inputs(shape: Shape, device: str) -> tuple[Tensor, ...]:
    """Normal logits with one outlier a row, as a trained model's are; for a linear loss, hidden states and a weight."""
    dtype = getattr(torch, shape.dtype)
    generator = torch.Generator(device).manual_seed(0)

    def normal(*sizes: int) -> Tensor:
        return torch.empty(sizes, dtype=dtype, device=device).normal_(generator=generator)

    index = torch.randint(shape.classes, (shape.rows,), device=device, generator=generator)
    if shape.section == "linear":
        return normal(shape.rows, shape.hidden), normal(shape.classes, shape.hidden) * shape.hidden**-0.5, index
    logits = normal(shape.rows, shape.classes)
    logits.scatter_add_(1, index[:, None], torch.full((shape.rows, 1), 8.0, dtype=dtype, device=device))
    if shape.section == "dense":
        return logits, normal(shape.rows, shape.classes).softmax(1)
    return logits, index


def gradient_error(shape: Shape, inputs: Sequence[Tensor], gradients: Sequence[Tensor | None], rows: int = 16) -> float:
    """Relative Frobenius error of the first gradient's first rows against float64; nan where one is missing."""
    gradient = gradients[0] if gradients else None
    if gradient is None:
        return float("nan")
    source = inputs[0][:rows].double()
    weight = inputs[1].double() if shape.section == "linear" else None
    logits = source if weight is None else source @ weight.t()
    p = torch.softmax(logits, 1)
    target = inputs[-1][:rows]
    want = p * target.double().sum(1, keepdim=True) - target if shape.section == "dense" else p
    if shape.section != "dense":
        want[torch.arange(len(target)), target] -= 1
    want = (want if weight is None else want @ weight) / shape.rows
    return float((gradient[:rows].double() - want).norm() / want.norm())


class Timer:
    """Milliseconds of one call on the GPU's own clock, from a cold L2."""

    def __init__(self) -> None:
        self.scrub = torch.empty(SCRUB_BYTES // 4, dtype=torch.int32, device="cuda")

    def __call__(self, call: Callable[[], object]) -> float:
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        self.scrub.zero_()
        begin.record()
        call()
        end.record()
        end.synchronize()
        return float(begin.elapsed_time(end))


def peak_bytes(call: Call) -> int:
    """Beyond what is allocated before the call, its gradients included."""
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    result = call()
    torch.cuda.synchronize()
    del result
    return int(torch.cuda.max_memory_allocated() - before)


def _prepare(peer: Peer, shape: Shape, inputs: tuple[Tensor, ...]) -> tuple[Call, Call, dict[str, Any]]:
    """The timed call, what restores its inputs before each, and what is known of it after the first."""
    source = inputs[0]
    own = (source.clone(), *inputs[1:]) if peer.overwrites else tuple(t.detach() for t in inputs)
    call = peer.build(*own)

    def restore() -> None:
        if peer.overwrites:
            own[0].data.copy_(source)

    result = call()  # compiles
    torch.cuda.synchronize()
    facts: dict[str, Any] = {"version": peer.version}
    if isinstance(result, tuple):
        loss, gradients = result
        facts |= {"loss": float(loss), "gradient_error": gradient_error(shape, inputs, gradients)}
    del result
    restore()
    facts["peak_bytes"] = peak_bytes(call)
    return call, restore, facts


def measure(shape: Shape, on_step: Callable[[str], object] = lambda what: None) -> dict[str, Any]:
    """A record: milliseconds of each round by contestant, errors, and the copy of the logits beside them."""
    inputs = make_inputs(shape, "cuda")
    timer = Timer()
    results: dict[str, dict[str, Any]] = {}
    calls: dict[str, tuple[Call, Call]] = {}
    if shape.section != "linear":
        buffer = torch.empty_like(inputs[0])
        calls["copy"] = (lambda: buffer.copy_(inputs[0]), lambda: None)
        results["copy"] = {}
    for peer in PEERS[shape.section]:
        on_step(f"{shape.name}: {peer.label}")
        reasons = peer.reasons()
        if reasons:
            results[peer.name] = {"skipped": "; ".join(reasons)}
            continue
        try:
            call, restore, facts = _prepare(peer, shape, inputs)
        except Exception as error:  # of a contestant: out of memory, an unsupported shape, a broken peer
            results[peer.name] = {"error": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"}
            torch.cuda.empty_cache()
            continue
        calls[peer.name] = (call, restore)
        results[peer.name] = facts
    for name, times in interleave(calls, timer).items():
        results[name] |= {"ms": times, "median_ms": statistics.median(times)}
    return {"shape": shape._asdict(), "name": shape.name, "bytes": shape.least_bytes, "results": results}


def interleave(calls: dict[str, tuple[Call, Call]], timer: Callable[[Call], float]) -> dict[str, list[float]]:
    """Each contestant once a round, in shuffled order, until the slowest share of the time is used up."""
    order = random.Random(0)
    first = {}
    for name, (call, restore) in calls.items():
        restore()
        timer(call)
        restore()
        first[name] = timer(call)
    rounds = max(7, min(200, int(1000 * SECONDS * len(calls) / max(sum(first.values()), 1e-3))))
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        turn = list(calls)
        order.shuffle(turn)
        for name in turn:
            call, restore = calls[name]
            restore()
            times[name].append(timer(call))
    return times

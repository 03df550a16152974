# SPDX-License-Identifier: BSD-3-Clause
"""The forms suite: every target form and row loss on the same logits, against plain class indices.

The contestants of one case are the forms themselves; ``eager-FORM`` is the same loss written in plain torch, as its
users write it today.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .accuracy import gradient_limit
from .adapters import Adapter, end_to_end, entries, no_softce, registry, softce_module
from .cases import DTYPES, SMOOTHING, Case, Inputs
from .cases import make_inputs as make_plain
from .measure import Progress, Record, ignore, record_of
from .timer import Entry, describe, interleave

ENTRIES = 64  # K of top-k
LAM = 0.7
Loss = Callable[[Tensor], Tensor]


@dataclass
class Parts:
    """All the targets of a case, made once and shared by its forms."""

    case: Case
    logits: Tensor
    index: Tensor  # (N,)
    other: Tensor  # (N,), the second of a mixup pair
    soft: Tensor  # (N, C) probabilities
    teacher: Tensor  # (N, C) logits
    top_index: Tensor  # (N, K)
    top_prob: Tensor  # (N, K)


def make_inputs(case: Case) -> Parts:
    hard: Inputs = make_plain(Case(case.shape, case.dtype, "hard"))
    generator = torch.Generator().manual_seed(1)
    teacher = torch.empty(case.shape).normal_(std=2.0, generator=generator)
    prob = teacher.softmax(1)
    entries = min(ENTRIES, case.classes)
    top_prob, top_index = prob.topk(entries, dim=1)
    other = hard.target[torch.randperm(case.shape[0], generator=generator)]
    dtype = DTYPES[case.dtype]
    return Parts(
        case, hard.logits, hard.target, other, prob.to(dtype), teacher.to(dtype), top_index, top_prob.to(dtype)
    )


def _softce(parts: Parts, target: Any, **kwargs: Any) -> Loss:
    softce = softce_module()
    assert softce is not None
    function = softce.cross_entropy
    return lambda x: function(x, target, **kwargs)


def _from_softce(name: str) -> Any:
    return getattr(softce_module(), name)


FORMS: dict[str, Callable[[Parts], Loss]] = {
    "hard": lambda p: _softce(p, p.index),
    "smoothed": lambda p: _softce(p, p.index, label_smoothing=SMOOTHING),
    "mixup": lambda p: _softce(p, _from_softce("Mixup")(p.index, p.other, LAM)),
    "topk": lambda p: _softce(p, _from_softce("TopK")(p.top_index, p.top_prob)),
    "soft": lambda p: _softce(p, p.soft),
    "teacher": lambda p: _softce(p, _from_softce("Teacher")(p.teacher)),
    "focal": lambda p: _softce(p, p.index, row_loss=_from_softce("Focal")(gamma=2.0)),
    "relaxation": lambda p: _softce(p, p.index, row_loss=_from_softce("LabelRelaxation")(alpha=0.1)),
    "generalized": lambda p: _softce(p, p.index, row_loss=_from_softce("GeneralizedCrossEntropy")(q=0.7)),
    "poly1": lambda p: _softce(p, p.index, row_loss=_from_softce("Poly1")(epsilon=1.0)),
}


def _eager_mixup(p: Parts) -> Loss:
    return lambda x: LAM * F.cross_entropy(x, p.index) + (1 - LAM) * F.cross_entropy(x, p.other)


def _eager_topk(p: Parts) -> Loss:
    return lambda x: -(p.top_prob * x.log_softmax(1).gather(1, p.top_index)).sum(1).mean()


def _eager_soft(p: Parts) -> Loss:
    return lambda x: F.cross_entropy(x, p.soft)


def _eager_teacher(p: Parts) -> Loss:
    return lambda x: F.cross_entropy(x, p.teacher.softmax(1))


EAGER: dict[str, Callable[[Parts], Loss]] = {
    "mixup": _eager_mixup,
    "topk": _eager_topk,
    "soft": _eager_soft,
    "teacher": _eager_teacher,
}


def _build(make: Callable[[Parts], Loss]) -> Callable[[str, Parts], Entry]:
    def build(name: str, parts: Parts) -> Entry:
        loss = make(parts)
        inputs = Inputs(Case(parts.case.shape, parts.case.dtype, "hard"), parts.logits, parts.index)
        return end_to_end(name, lambda x, target, **kwargs: loss(x), inputs)

    return build


ADAPTERS = registry(
    *(Adapter(name, name, _build(make), no_softce) for name, make in FORMS.items()),
    *(Adapter(f"eager-{name}", f"{name} in eager torch", _build(make)) for name, make in EAGER.items()),
)


def check(found: Sequence[Entry], limit: float) -> dict[str, str]:
    """The entries that fail, or whose gradient is not that of their eager counterpart (where they have one)."""
    wrong: dict[str, str] = {}
    gradients: dict[str, Tensor] = {}
    for entry in found:
        try:
            entry.before()
            entry.run()
            assert entry.gradient is not None
            gradient = entry.gradient()
            assert gradient is not None
            base = entry.name.removeprefix("eager-")
            if base not in EAGER:
                continue
            if base not in gradients:
                gradients[base] = gradient.clone()
                continue
            error = float((gradient.double() - gradients[base].double()).norm() / gradient.double().norm())
            if not error <= limit:
                wrong[base] = f"gradient differs from eager's by {error:.1e} (relative), limit {limit:.1e}"
        except Exception as failure:
            wrong[entry.name] = describe(failure)
        finally:
            entry.after()
    return wrong


def time_case(
    case: Case, names: Sequence[str], *, seconds: float, threads: int = 1, progress: Progress = ignore
) -> Record:
    """Times the forms ``names`` on the logits of ``case``, interleaved, twice as long as ``measure.time_case``."""
    torch.set_num_threads(threads)
    parts = make_inputs(case)
    found, skipped = entries(names, parts, ADAPTERS)
    samples = interleave(found, seconds=2 * seconds, on_round=progress)
    alive = [entry for entry in found if samples[entry.name].error is None]
    return record_of("forms", case, samples, skipped, check(alive, gradient_limit(DTYPES[case.dtype])), threads=threads)


def all_cases(quick: bool = False) -> list[Case]:
    """2^24 logits; the kind says that every form is in the case."""
    shapes = ((64, 32768),) if quick else ((512, 32768), (128, 131072))
    return [Case(shape, dtype, "every form") for dtype in DTYPES for shape in shapes]

# SPDX-License-Identifier: BSD-3-Clause
"""The suites by name: how a process of its own finds a case's inputs, contestants and timing."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from . import adapters, cases, forms, linear, measure


@dataclass(frozen=True)
class Suite:
    """``case_of`` reads a case from JSON; ``time_case(case, names, seconds=, threads=, progress=)`` times it."""

    case_of: Callable[[dict[str, Any]], Any]
    make_inputs: Callable[[Any], Any]
    adapters: dict[str, adapters.Adapter]
    time_case: Callable[..., measure.Record]


def _logits_case(found: dict[str, Any]) -> cases.Case:
    return cases.Case(tuple(found["shape"]), found["dtype"], found["kind"])


def _linear_case(found: dict[str, Any]) -> linear.LinearCase:
    return linear.LinearCase(**found)


SUITES = {
    "logits": Suite(_logits_case, cases.make_inputs, adapters.ADAPTERS, measure.time_case),
    "forms": Suite(_logits_case, forms.make_inputs, forms.ADAPTERS, forms.time_case),
    "linear": Suite(_linear_case, linear.make_inputs, linear.ADAPTERS, linear.time_case),
}

# SPDX-License-Identifier: BSD-3-Clause
"""Demonstrations: ``python -m softce demo [language-model | calibration] [OPTIONS]``."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Sequence

# name: (module, what it shows); the first one runs where none is named
DEMOS = {
    "language-model": (
        "softce.demo.language_model",
        "train a small language model with torch's loss and with softce's",
    ),
    "calibration": ("softce.demo.calibration", "what smoothing does to confidence and calibration on real data"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the demo that ``argv`` names; the remaining arguments are its own."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    name = next(iter(DEMOS))
    if arguments and not arguments[0].startswith("-"):
        name = arguments.pop(0)
        if name not in DEMOS:
            print(f"softce demo: no demo is called {name!r}; there are:", file=sys.stderr)
            print(*(f"  {known:16s} {what}" for known, (_, what) in DEMOS.items()), sep="\n", file=sys.stderr)
            return 2
    module = DEMOS[name][0]
    if importlib.util.find_spec(module) is None:
        print(f"softce demo: {name} is not part of this installation", file=sys.stderr)
        return 1
    demo = importlib.import_module(module)
    status: int = demo.main(arguments)
    return status

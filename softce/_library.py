# SPDX-License-Identifier: BSD-3-Clause
"""Locates and loads the compiled libraries, and reads their facts (plain C functions, through ctypes).

Loading ``libsoftce.so`` registers the CPU implementations of the operators in :mod:`softce.ops`. The environment
variable ``SOFTCE_LIBRARY`` names another file to load instead, for instance one built with sanitizers;
``SOFTCE_CUDA_LIBRARY`` does so for the CUDA library.
"""

from __future__ import annotations

import ctypes
import json
import os
import re
from functools import cache
from numbers import Real
from pathlib import Path
from typing import Any

from ._version import __version__

PACKAGE = Path(__file__).resolve().parent


def build_facts() -> dict[str, Any]:
    """What ``setup.py`` wrote down about the build of this package; empty if it was never built."""
    try:
        facts: dict[str, Any] = json.loads((PACKAGE / "_build.json").read_text())
    except (OSError, ValueError):
        return {}
    return facts


class Library:
    """One compiled library: where it is, and why it cannot be used if it cannot."""

    def __init__(self, kind: str, filename: str, variable: str) -> None:
        self.kind = kind
        self.variable = variable
        self.default = PACKAGE / filename
        self._handle: ctypes.CDLL | None = None
        self._reason: str | None = None

    @property
    def path(self) -> Path:
        """The file that is loaded: ``SOFTCE_LIBRARY`` if set, else the one in the package."""
        return Path(os.environ.get(self.variable) or self.default)

    def reason(self) -> str | None:
        """Loads the library at the first call. None if it can be used, else why not."""
        if self._handle is None and self._reason is None:
            self._reason = self._load()
        return self._reason

    def _load(self) -> str | None:
        path = self.path
        if not path.exists():
            if os.environ.get(self.variable):
                return f"{self.variable} names {path}, which does not exist"
            why = build_facts().get(self.kind, {}).get("why")
            return f"it was not built: {why}" if why else f"it was not built: {path} is missing (make build)"
        try:
            handle = ctypes.CDLL(str(path))
        except OSError as error:
            return f"{path} cannot be loaded: {error}"
        info = getattr(handle, "softce_build_info", None)
        if info is not None:
            info.restype = ctypes.c_char_p
            built = parse_facts(info().decode()).get("softce")
            if built != __version__:
                return f"{path} was built for softce {built}, this is {__version__}: build it again"
        self._handle = handle
        return None

    def function(self, name: str, restype: Any, *argtypes: Any) -> Any:
        """A C function of the library.

        Raises:
            RuntimeError: the library cannot be used.
        """
        if self.reason() is not None:
            raise RuntimeError(f"softce: the {self.kind} library cannot be used: {self._reason}")
        function = getattr(self._handle, name)
        function.restype, function.argtypes = restype, list(argtypes)
        return function


def parse_facts(text: str) -> dict[str, str]:
    """``"key: value"`` lines as a dictionary."""
    return dict(line.split(": ", 1) for line in text.splitlines() if ": " in line)


CPU = Library("cpu", "libsoftce.so", "SOFTCE_LIBRARY")
CUDA = Library("cuda", "libsoftce_cuda.so", "SOFTCE_CUDA_LIBRARY")


def _text(name: str) -> str:
    text: bytes = CPU.function(name, ctypes.c_char_p)()
    return text.decode()


def build_info() -> dict[str, str]:
    """Compiler, flags and torch version of the loaded CPU library."""
    return parse_facts(_text("softce_build_info"))


def spec_fields() -> list[str]:
    """The fields of the C++ ``Spec``, in order; the same as ``softce.ops.Spec._fields``."""
    return _text("softce_spec_fields").split(",")


def isa_report() -> dict[str, str]:
    """The instruction sets of the CPU library, best first: ``"usable"`` or why not."""
    return parse_facts(_text("softce_isa_report"))


def isa_chosen() -> str:
    """The instruction set that the CPU kernels run on."""
    return _text("softce_isa_chosen")


def isa_choose(name: str) -> None:
    """Makes the CPU kernels run on another instruction set.

    Raises:
        ValueError: it was not built, or this machine lacks it.
    """
    if not CPU.function("softce_isa_choose", ctypes.c_int, ctypes.c_char_p)(name.encode()):
        raise ValueError(f"instruction set {name!r} cannot be used here: {isa_report()}")


# ---- the pool of output memory (csrc/pool.h) ----


@cache
def _pool_names() -> list[str]:
    return _text("softce_pool_stat_names").split(",")


def pool_stats() -> dict[str, int]:
    """State of the pool that large CPU gradients and buffers come from; empty if the CPU library cannot be used.

    Keys: ``idle_bytes`` and ``idle_blocks`` wait for reuse, ``live_bytes`` and ``live_blocks`` belong to tensors;
    ``reused`` and ``mapped`` count outputs served from idle memory and from fresh memory; ``limit_bytes`` and
    ``idle_ms`` are the bounds (:func:`set_pool_limits`); ``timer_running`` is 1 while the thread that returns idle
    memory lives.
    """
    if CPU.reason() is not None:
        return {}
    names = _pool_names()
    values = (ctypes.c_int64 * len(names))()
    CPU.function("softce_pool_stats", None, ctypes.POINTER(ctypes.c_int64))(values)
    return dict(zip(names, values, strict=True))


def empty_cache() -> int:
    """Gives the pool's idle memory back to the system.

    Returns:
        The number of bytes given back.
    """
    if CPU.reason() is not None:
        return 0
    return int(CPU.function("softce_pool_empty", ctypes.c_int64)())


def set_pool_limits(max_idle_bytes: float | None = None, idle_seconds: float | None = None) -> None:
    """Bounds the idle memory of the pool that large CPU gradients and buffers come from.

    Outputs of 1 MiB and more are taken from 2 MiB-aligned memory with huge pages; when such a tensor dies, its memory
    waits for the next output of about its size. What waits beyond ``max_idle_bytes`` (the least recently used first)
    or longer than ``idle_seconds`` goes back to the system. Sizes in whole huge pages, an idle block serves outputs
    between half and all of its size, and is grown for one up to twice its size.

    Args:
        max_idle_bytes: 0 keeps nothing, ``math.inf`` everything; None leaves the bound as it is. At the start it is a
            quarter of the machine's memory (of the control group's limit, if that is less), or the environment variable
            ``SOFTCE_POOL_LIMIT``, in bytes or with a suffix K, M, G.
        idle_seconds: None leaves it as it is. At the start it is 10, or ``SOFTCE_POOL_IDLE_SECONDS``.

    Raises:
        TypeError: a bound that is no number.
        ValueError: a negative bound.
    """
    for name, bound in (("max_idle_bytes", max_idle_bytes), ("idle_seconds", idle_seconds)):
        if bound is not None and (isinstance(bound, bool) or not isinstance(bound, Real)):
            raise TypeError(f"set_pool_limits: {name} must be a number or None, not {type(bound).__name__}")
    if (max_idle_bytes is not None and not max_idle_bytes >= 0) or (idle_seconds is not None and not idle_seconds >= 0):
        raise ValueError(
            f"set_pool_limits: bounds must not be negative, got max_idle_bytes={max_idle_bytes}, "
            f"idle_seconds={idle_seconds}"
        )
    if CPU.reason() is not None:
        return
    limit = -1 if max_idle_bytes is None else int(min(max_idle_bytes, 2**62))
    idle = -1 if idle_seconds is None else int(min(idle_seconds * 1000, 2**53))
    CPU.function("softce_pool_configure", None, ctypes.c_int64, ctypes.c_int64)(limit, idle)


def _bytes(variable: str, text: str) -> int:
    match = re.fullmatch(r"(\d+)([KMG]?)(?:i?B)?", text.strip(), re.IGNORECASE)
    if match is None:
        raise ValueError(f"{variable} must be a number of bytes such as 1000000, 512M or 2G, got {text!r}")
    return int(match[1]) << {"": 0, "K": 10, "M": 20, "G": 30}[match[2].upper()]


def _seconds(variable: str, text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = -1.0
    if not seconds >= 0:
        raise ValueError(f"{variable} must be a number of seconds, got {text!r}")
    return seconds


def configure_from_environment() -> None:
    """Applies ``SOFTCE_POOL_LIMIT``, ``SOFTCE_POOL_IDLE_SECONDS`` and ``SOFTCE_ISA``.

    Raises:
        ValueError: a value that cannot be read or used.
    """
    if CPU.reason() is not None:
        return
    limit, idle, isa = map(os.environ.get, ("SOFTCE_POOL_LIMIT", "SOFTCE_POOL_IDLE_SECONDS", "SOFTCE_ISA"))
    set_pool_limits(
        _bytes("SOFTCE_POOL_LIMIT", limit) if limit else None,
        _seconds("SOFTCE_POOL_IDLE_SECONDS", idle) if idle else None,
    )
    if isa:
        isa_choose(isa)

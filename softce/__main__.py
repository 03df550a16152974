# SPDX-License-Identifier: BSD-3-Clause
"""``python -m softce info | demo | bench | run``; each command's code is loaded only when it is called."""

from __future__ import annotations

import argparse
import builtins
import importlib
import os
import runpy
import sys
import types
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path

from ._version import __version__


def info(arguments: list[str]) -> None:
    """what was built, what is usable on this machine, and why the rest is not (--json)"""
    parser = argparse.ArgumentParser(prog="python -m softce info", description=info.__doc__)
    parser.add_argument("--json", action="store_true", help="the same facts as JSON")
    importlib.import_module("softce.info").main(parser.parse_args(arguments).json)


def demo(arguments: list[str]) -> None:
    """train with torch's loss and with softce's and compare (demo calibration: what smoothing does to confidence)"""
    try:
        result = importlib.import_module("softce.demo").main(arguments)
    except ModuleNotFoundError as error:
        raise SystemExit(f"softce demo needs {error.name}: pip install 'softce[demo]'") from None
    raise SystemExit(result)


def bench(arguments: list[str]) -> None:
    """the benchmarks, side by side with torch (in the source tree)"""
    root = Path(__file__).resolve().parent.parent
    if not (root / "bench" / "__main__.py").exists() or not (root / "setup.py").exists():
        raise SystemExit(
            "softce bench: the benchmarks are in the source tree and not in the installed package; get the sources and "
            "run `make bench`, or `python -m softce bench` after `pip install --no-build-isolation -e .`, there"
        )
    sys.path.insert(0, str(root))
    sys.argv = ["python -m softce bench", *arguments]
    runpy.run_module("bench", run_name="__main__")


def run(arguments: list[str]) -> None:
    """SCRIPT [ARGS...] or -m MODULE [ARGS...]: run it unchanged, with every cross-entropy on softce"""
    as_module = arguments[:1] == ["-m"]
    name, *rest = (arguments[1:] if as_module else arguments) or [""]
    if name == "" or (name.startswith("-") and not as_module):
        print(f"usage: python -m softce run {run.__doc__}")
        raise SystemExit(0 if name in ("-h", "--help") else 2)
    if not as_module and not Path(name).exists():
        print(f"softce run: there is no file {name!r}", file=sys.stderr)
        raise SystemExit(2)  # as python does
    importlib.import_module("softce.install").install()
    sys.argv = [name, *rest]
    if as_module:
        runpy.run_module(name, run_name="__main__", alter_sys=True)
    else:
        _run_file(name)


def _run_file(name: str) -> None:
    """``python NAME``: ``__file__`` is absolute, and ``__main__`` stays the script's to the end of the process."""
    file = os.path.join(os.getcwd(), name)  # not normalised, as Python does it
    if os.path.isdir(file) or file.endswith(".pyc") or zipfile.is_zipfile(file):
        del sys.path[0]
        runpy.run_path(file, run_name="__main__")
        return
    sys.path[0] = str(Path(name).resolve().parent)  # in place of the current directory
    main = sys.modules["__main__"] = types.ModuleType("__main__")
    main.__dict__.update(__file__=file, __builtins__=builtins)
    # The rest of runpy.run_path puts sys.argv[0] and __main__ back at the end; threads and atexit come later.
    exec(compile(Path(file).read_bytes(), file, "exec", dont_inherit=True), main.__dict__)


COMMANDS: dict[str, Callable[[list[str]], None]] = {f.__name__: f for f in (info, demo, bench, run)}


def main(argv: Sequence[str] | None = None) -> None:
    """The command line: the first argument names the command, which takes the rest."""
    name, *rest = list(sys.argv[1:] if argv is None else argv) or ["--help"]
    if name in COMMANDS:
        COMMANDS[name](rest)
    elif name in ("--version", "-V"):
        print(f"softce {__version__}")
    else:
        known = name in ("-h", "--help", "help")
        usage = ["usage: python -m softce COMMAND [ARGS...]", *(f"  {n:6} {f.__doc__}" for n, f in COMMANDS.items())]
        print("\n".join(usage if known else [f"softce: there is no command {name!r}", *usage]))
        raise SystemExit(0 if known else 2)


if __name__ == "__main__":
    main()

# SPDX-License-Identifier: BSD-3-Clause
"""The package as a package: what its libraries depend on, what importing it costs, what it says about itself."""

from __future__ import annotations

import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import softce
from softce import _library, backends, ops
from softce.__main__ import main
from softce._version import __version__

ROOT = Path(__file__).resolve().parent.parent
compiled = pytest.mark.usefixtures("cpu_kernels")
in_source_tree = pytest.mark.skipif(not (ROOT / "setup.py").exists(), reason="not in the source tree")


def python(*arguments: str, cwd: Path | None = None, **environment: str) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join([str(_library.PACKAGE.parent), *filter(None, [os.environ.get("PYTHONPATH")])])
    return subprocess.run(
        [sys.executable, *arguments],
        capture_output=True,
        text=True,
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": path, **environment},
        timeout=300,
    )


# ---- the libraries ----


@pytest.mark.parametrize("library", [_library.CPU, _library.CUDA], ids=["cpu", "cuda"])
def test_libraries_use_only_torchs_stable_interface(library: _library.Library) -> None:
    if not library.path.exists():
        pytest.skip(f"{library.path} was not built")
    if not shutil.which("nm"):
        pytest.skip("nm is not installed")
    listing = subprocess.run(["nm", "-D", "--undefined-only", library.path], capture_output=True, text=True, check=True)
    symbols = [line.split()[-1].split("@")[0] for line in listing.stdout.splitlines()]
    # Mangled names of things in the namespaces c10, at and torch contain their lengths and names.
    assert [
        s for s in symbols if s.startswith("_Z") and any(n in s for n in ("3c10", "2at", "5torch", "6caffe2"))
    ] == []
    ours = [s for s in symbols if "torch" in s]
    assert any(s.startswith("aoti_torch_") for s in ours)
    assert [s for s in ours if not s.startswith(("aoti_torch_", "torch_"))] == []
    assert [s for s in symbols if s.startswith(("Py", "_Py"))] == [], "one build serves every Python"


@compiled
def test_spec_is_the_same_in_python_and_in_cpp() -> None:
    assert _library.spec_fields() == list(ops.Spec._fields)


@compiled
def test_build_info() -> None:
    info = _library.build_info()
    assert info["softce"] == __version__
    assert "-std=c++17" in info["flags"]
    assert tuple(map(int, info["torch"].split(".")[:2])) >= (2, 11)


@compiled
def test_every_usable_instruction_set_can_be_chosen() -> None:
    report, before = _library.isa_report(), _library.isa_chosen()
    usable = [name for name, state in report.items() if state == "usable"]
    assert before in usable
    logits, target = torch.randn(8, 100), torch.arange(8)
    expected = torch.nn.functional.cross_entropy(logits, target)
    try:
        for name in usable:
            _library.isa_choose(name)
            assert _library.isa_chosen() == name
            torch.testing.assert_close(softce.cross_entropy(logits, target), expected)
        for name in {"none", *report} - set(usable):
            with pytest.raises(ValueError, match="cannot be used here"):
                _library.isa_choose(name)
    finally:
        _library.isa_choose(before)


OVERFLOW = """
import ctypes
from softce import _library
_library.CPU.function("softce_pool_stats", None, ctypes.c_void_p)(ctypes.create_string_buffer(8))
"""


@compiled
def test_sanitizers_are_awake_in_a_sanitized_build() -> None:
    if "sanitizers" not in _library.build_info():
        pytest.skip("the library is not built with sanitizers")
    result = python("-c", OVERFLOW, PYTHONMALLOC="malloc")
    assert result.returncode != 0
    assert "heap-buffer-overflow" in result.stderr


# ---- import ----

LIGHT = """
import json, sys
import torch
before = set(sys.modules)
import softce
print(json.dumps([sorted(set(sys.modules) - before), torch.cuda.is_initialized()]))
"""


def test_import_is_light() -> None:
    result = python("-W", "ignore", "-c", LIGHT)
    assert result.returncode == 0, result.stderr
    loaded, cuda_initialized = json.loads(result.stdout)
    heavy = (
        "triton",
        "matplotlib",
        "tokenizers",
        "keras",
        "sklearn",
        "tqdm",
        "numpy",
        "torch._dynamo",
        "torch._inductor",
    )
    assert [name for name in loaded if name.startswith(heavy)] == []
    assert [name for name in loaded if name.startswith(("softce.demo", "softce.integrations", "softce.info"))] == []
    assert not cuda_initialized


def test_public_names() -> None:
    assert softce.__version__ == __version__
    assert sorted(softce.__all__) == list(softce.__all__)
    for name in softce.__all__:
        assert getattr(softce, name).__doc__, f"softce.{name} has no docstring"
    assert (_library.PACKAGE / "py.typed").exists()


def test_version_of_the_installed_package() -> None:
    try:
        installed = importlib.metadata.version("softce")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("softce is not installed")
    assert installed == __version__


# ---- backends and what is said about them ----


def test_backends_give_reasons() -> None:
    assert backends.NAMES == ("reference", "cpu", "triton", "cuda")
    assert backends.unavailable("reference") == []
    for name in backends.NAMES:
        assert all(isinstance(reason, str) and reason for reason in backends.unavailable(name))
    if not torch.cuda.is_available():
        assert backends.unavailable("triton")
        assert backends.unavailable("cuda")
    with pytest.raises(ValueError, match="backend must be one of reference, cpu, triton, cuda, got 'gpu'"):
        backends.unavailable("gpu")


def test_info() -> None:
    text = python("-m", "softce", "info")
    assert text.returncode == 0, text.stderr
    facts = json.loads(python("-m", "softce", "info", "--json").stdout)
    assert facts["softce"] == __version__
    assert facts["torch"] == torch.__version__
    assert list(facts["backends"]) == list(backends.NAMES)
    for name, reasons in facts["backends"].items():
        assert reasons == backends.unavailable(name)
        assert all(reason in text.stdout for reason in reasons)
        line = next(line for line in text.stdout.splitlines() if line.startswith(f"{name} "))
        assert ("usable" if not reasons else "cannot run") in line
    for name, state in facts["instruction_sets"].items():
        assert f"{name} " in text.stdout
        assert state in text.stdout
    if not backends.unavailable("cpu"):
        assert facts["instruction_sets"][facts["instruction_set"]] == "usable"
        assert facts["pool"]["limit_bytes"] > 0


MISSING = """
import json, sys, torch, softce
x, t = torch.randn(4, 5, dtype=torch.float64, requires_grad=True), torch.arange(4)
loss = softce.cross_entropy(x, t)
assert torch.allclose(loss, torch.nn.functional.cross_entropy(x, t))
loss.backward()
assert softce.pool_stats() == {} and softce.empty_cache() == 0
try:
    softce.cross_entropy(x, t, options=softce.Options(backend="cpu"))
except RuntimeError as error:
    print(error)
print("INFO")
from softce.__main__ import main
main(["info", "--json"])
"""


def test_without_a_library_the_reference_works_and_says_why(tmp_path: Path) -> None:
    missing = str(tmp_path / "libmissing.so")
    broken = tmp_path / "libbroken.so"
    broken.write_text("not a library")
    for path, why in (
        (missing, f"SOFTCE_LIBRARY names {missing}, which does not exist"),
        (str(broken), "cannot be loaded"),
    ):
        result = python("-c", MISSING, SOFTCE_LIBRARY=path)
        assert result.returncode == 0, result.stderr
        assert why in result.stderr, "a warning says what is missing"
        error, _, info = result.stdout.partition("INFO\n")
        assert "backend 'cpu' cannot run" in error
        assert why in error
        assert why in json.loads(info)["backends"]["cpu"][0]


# ---- the command line ----

SCRIPT = """
import sys, torch
from torch.nn.functional import cross_entropy
with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
    loss = cross_entropy(torch.randn(4, 5, requires_grad=True), torch.arange(4))
    loss.backward()
fused = "softce::row_fused" in {event.name for event in profile.events()}
print(__name__, sys.argv[1:], sys.path[0], type(loss.grad_fn).__name__, fused)
"""


def test_run_takes_an_unchanged_script_or_module(tmp_path: Path) -> None:
    folder = tmp_path / "there"
    folder.mkdir()
    (folder / "script.py").write_text(SCRIPT)
    own = python(str(folder / "script.py"), "--flag", "-m", "x", cwd=tmp_path)
    on_softce = python("-m", "softce", "run", str(folder / "script.py"), "--flag", "-m", "x", cwd=tmp_path)
    assert on_softce.returncode == 0, on_softce.stderr
    *same, node, fused = on_softce.stdout.split()
    assert same == own.stdout.split()[:-2]
    assert own.stdout.split()[-2:] == ["NllLossBackward0", "False"]
    as_module = python("-m", "softce", "run", "-m", "script", "1", "-h", cwd=folder)
    assert as_module.returncode == 0, as_module.stderr
    assert as_module.stdout.split()[:3] == ["__main__", "['1',", "'-h']"]
    if not backends.unavailable("cpu"):
        assert node != "NllLossBackward0"
        assert fused == as_module.stdout.split()[-1] == "True"


@pytest.mark.parametrize("command", ["fly", "run", "run -m"])
def test_unknown_command_and_nothing_to_run(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["run", "nowhere.py"])
    assert stop.value.code == 2 and "there is no file 'nowhere.py'" in capsys.readouterr().err
    with pytest.raises(SystemExit) as stop:
        main(command.split())
    assert stop.value.code == 2
    assert ("there is no command 'fly'" if command == "fly" else "usage: ") in capsys.readouterr().out


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    main(["--version"])
    assert capsys.readouterr().out == f"softce {__version__}\n"


# ---- the build ----


@in_source_tree
def test_builds_without_a_compiler(tmp_path: Path) -> None:
    command = ["setup.py", "-q", "build_ext", "--build-lib", str(tmp_path), "--build-temp", str(tmp_path / "temp")]
    result = python(*command, cwd=ROOT, CXX="/no/compiler", SOFTCE_CUDA="0")
    assert result.returncode == 0, result.stderr
    assert "the cpu library is not built: no C++ compiler found (looked for /no/compiler)" in result.stderr
    facts = json.loads((tmp_path / "softce/_build.json").read_text())
    assert facts["cpu"] == {"built": False, "why": "no C++ compiler found (looked for /no/compiler)"}
    assert facts["cuda"] == {"built": False, "why": "switched off by SOFTCE_CUDA=0 when softce was built"}
    assert not list(tmp_path.glob("softce/*.so"))


@in_source_tree
def test_cuda_is_built_or_fails_when_it_is_asked_for(tmp_path: Path) -> None:
    command = ["setup.py", "-q", "build_ext", "--build-lib", str(tmp_path), "--build-temp", str(tmp_path / "temp")]
    result = python(*command, cwd=ROOT, CXX="/no/compiler", SOFTCE_CUDA="1")
    assert result.returncode != 0
    assert python(*command, cwd=ROOT, CXX="/no/compiler", SOFTCE_CUDA="maybe").returncode != 0


@in_source_tree
def test_every_source_file_names_its_license() -> None:
    files = [path for folder in ("softce", "csrc", "tests", "bench", ".ci") for path in (ROOT / folder).rglob("*")]
    kinds = (".py", ".cpp", ".h", ".cu", ".cuh")
    sources = [path for path in files if path.suffix in kinds or path.name == "run"]
    assert len(sources) > 20
    without = [str(p.relative_to(ROOT)) for p in sources if "SPDX-License-Identifier" not in p.read_text()[:200]]
    assert without == []

# SPDX-License-Identifier: BSD-3-Clause
"""``softce.install()``: torch's own names run on softce, whoever calls them; what softce cannot take is torch's."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cases import torch_cases
from checks import kernel_calls, run, same
from torch import Tensor, nn
from torch.nn.functional import cross_entropy as imported_earlier

import softce

X = torch.randn(4, 5, generator=torch.Generator().manual_seed(1))
Y = torch.tensor([0, -100, 4, 2])
P = torch.softmax(X.flip(0), 1)


@pytest.fixture(autouse=True)
def _clean(cpu_kernels: None) -> Iterator[None]:
    """Every test starts and ends with torch's own."""
    softce.uninstall()
    yield
    softce.uninstall()


def ran(function: Any, *args: Any, **kwargs: Any) -> bool:
    """Whether the call ran on softce's kernels."""
    with kernel_calls() as calls:
        function(*args, **kwargs)
    return bool(calls)


# ---- in and out ----


def test_install_and_uninstall() -> None:
    assert not ran(F.cross_entropy, X, Y)
    softce.install()
    assert ran(F.cross_entropy, X, Y)
    softce.install()  # twice is once
    assert ran(F.cross_entropy, X, Y)
    softce.uninstall()
    assert not ran(F.cross_entropy, X, Y)
    softce.uninstall()
    assert not ran(F.cross_entropy, X, Y)
    for _ in range(3):
        softce.install()
        assert ran(F.cross_entropy, X, Y)
        softce.uninstall()
        assert not ran(F.cross_entropy, X, Y)


def test_installed_nests_and_undoes() -> None:
    with softce.installed():
        assert ran(F.cross_entropy, X, Y)
        with softce.installed():
            assert ran(F.cross_entropy, X, Y)
        assert ran(F.cross_entropy, X, Y)
    assert not ran(F.cross_entropy, X, Y)
    softce.install()
    with softce.installed():
        pass
    assert ran(F.cross_entropy, X, Y)
    with softce.installed():
        softce.uninstall()
        assert not ran(F.cross_entropy, X, Y)
    assert ran(F.cross_entropy, X, Y)
    softce.uninstall()
    with pytest.raises(KeyError), softce.installed():
        raise KeyError
    assert not ran(F.cross_entropy, X, Y)


def test_overlapping_blocks() -> None:
    """As two threads have them, which do not end in the order of a stack."""
    first, second = softce.installed(), softce.installed()
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert ran(F.cross_entropy, X, Y)
    second.__exit__(None, None, None)
    assert not ran(F.cross_entropy, X, Y)


def test_installing_warns_of_nothing(recwarn: pytest.WarningsRecorder) -> None:
    with softce.installed():
        F.cross_entropy(X, Y)
    assert not [w for w in recwarn if "kernel" in str(w.message) or "softce" in str(w.message)]


# ---- who is served ----


def test_every_way_to_call_it() -> None:
    """Also functions and modules made before."""
    made_before = nn.CrossEntropyLoss(label_smoothing=0.1)
    ways = [
        (F.cross_entropy, (X, Y)),
        (imported_earlier, (X, Y)),
        (torch.nn.functional.cross_entropy, (X, Y)),
        (made_before, (X, Y)),
        (nn.CrossEntropyLoss(), (X, Y)),
        (torch.ops.aten.cross_entropy_loss, (X, Y)),
        (torch._C._nn.cross_entropy_loss, (X, Y)),
    ]
    wanted = [function(*args) for function, args in ways]
    with softce.installed():
        for (function, args), want in zip(ways, wanted, strict=True):
            with kernel_calls() as calls:
                got = function(*args)
            assert calls
            torch.testing.assert_close(got, want)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", list(torch_cases())[::5], ids=lambda c: c.name)
def test_equal_to_softce(case: Any, dtype: torch.dtype) -> None:
    """Installed, torch's names give softce's numbers, to the bit."""
    input, target, kwargs = case.make("cpu", dtype)
    upstream = 0.5 if case.reduction == "none" else None
    want = run(softce.cross_entropy, input, target, upstream=upstream, **kwargs)
    with softce.installed():
        got = run(F.cross_entropy, input, target, upstream=upstream, **kwargs)
    assert same(got[0], want[0]) and same(got[1], want[1])


def test_training_steps_are_the_fused_kernel() -> None:
    x = X.clone().requires_grad_()
    with softce.installed(), kernel_calls() as calls:
        F.cross_entropy(x, Y).backward()
    assert calls == {"row_fused": 1}


def test_backward_after_uninstall() -> None:
    x = X.clone().requires_grad_()
    with softce.installed():
        losses = [F.cross_entropy(x, Y), F.cross_entropy(x, Y, reduction="none").sum()]
    want = torch.autograd.grad(F.cross_entropy(x, Y), x)[0]
    for loss, factor in zip(losses, (1, 3), strict=True):
        torch.testing.assert_close(torch.autograd.grad(loss, x)[0], factor * want)


def test_grad_modes_and_threads() -> None:
    with softce.installed():
        with torch.no_grad():
            assert ran(F.cross_entropy, X, Y)
        with torch.inference_mode():
            assert ran(F.cross_entropy, X.clone(), Y)
            assert ran(F.cross_entropy, X, Y)
        seen: list[bool] = []
        thread = threading.Thread(target=lambda: seen.append(torch.isfinite(F.cross_entropy(X, Y)).item()))
        thread.start()
        thread.join()
        assert seen == [True]


def test_legacy_arguments_and_positional_calls() -> None:
    w = torch.rand(5)
    want = F.cross_entropy(X, Y, w, None, -100, None, "sum", 0.1)
    with softce.installed():
        torch.testing.assert_close(F.cross_entropy(X, Y, w, None, -100, None, "sum", 0.1), want)
        with pytest.warns(UserWarning, match="size_average"):
            F.cross_entropy(X, Y, size_average=False)


# ---- autocast ----


@pytest.mark.parametrize("input_dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("dense", [False, True], ids=["indices", "probabilities"])
def test_autocast(input_dtype: torch.dtype, dense: bool) -> None:
    """Torch's dtypes; the kernels read half-precision logits as they are; the gradient comes back in their dtype."""
    x = X.to(input_dtype)
    t = torch.rand(4, 5).to(input_dtype) if dense else Y
    w = torch.rand(5)
    for kwargs in ({}, {"weight": w.to(input_dtype)}, {"weight": w} if input_dtype != torch.float64 else {}):
        with torch.autocast("cpu", torch.bfloat16):
            want = run(F.cross_entropy, x, t, **kwargs)
            with softce.installed(), kernel_calls() as calls:
                got = run(F.cross_entropy, x, t, **kwargs)
        assert calls
        assert (got[0].dtype, got[1].dtype) == (want[0].dtype, want[1].dtype)
        tolerance = {} if input_dtype in (torch.float32, torch.float64) else {"rtol": 1e-2, "atol": 1e-3}
        torch.testing.assert_close(got, want, **tolerance)


def test_autocast_of_what_goes_to_torch() -> None:
    """A transform inside autocast: torch's own formula, with torch's own autocast rule."""

    def loss(x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return F.cross_entropy(x, Y)

    want = torch.func.grad_and_value(loss)(X.bfloat16())
    with softce.installed():
        got = torch.func.grad_and_value(loss)(X.bfloat16())
    torch.testing.assert_close(got, want)


# ---- what goes to torch ----


def test_transforms_go_to_torch() -> None:
    want = [
        torch.func.grad(lambda x: F.cross_entropy(x, Y))(X),
        torch.func.jvp(lambda x: F.cross_entropy(x, Y), (X,), (torch.ones_like(X),)),
        torch.func.vmap(F.cross_entropy)(torch.stack((X, X)), torch.stack((Y, Y))),
        torch.func.hessian(lambda x: F.cross_entropy(x, Y))(X),
    ]
    with softce.installed():
        got = [
            torch.func.grad(lambda x: F.cross_entropy(x, Y))(X),
            torch.func.jvp(lambda x: F.cross_entropy(x, Y), (X,), (torch.ones_like(X),)),
            torch.func.vmap(F.cross_entropy)(torch.stack((X, X)), torch.stack((Y, Y))),
            torch.func.hessian(lambda x: F.cross_entropy(x, Y))(X),
        ]
    torch.testing.assert_close(got, want)


def test_create_graph_and_second_backward() -> None:
    results = []
    for context in (False, True):
        if context:
            softce.install()
        x = X.clone().requires_grad_()
        loss = F.cross_entropy(x, Y)
        (grad,) = torch.autograd.grad(loss, x, create_graph=True)
        results.append((grad.detach(), *torch.autograd.grad(grad.pow(2).sum(), x, retain_graph=True)))
        loss.backward()
        results[-1] = (*results[-1], x.grad)
    torch.testing.assert_close(results[1], results[0])


class Wrapped(Tensor):
    """A tensor subclass that softce knows nothing of."""


def test_subclasses_other_devices_dtypes_and_layouts_go_to_torch() -> None:
    wrapped, without = X.as_subclass(Wrapped), F.cross_entropy(X, P.to_sparse())
    with softce.installed():
        got = F.cross_entropy(wrapped, Y)
        assert isinstance(got, Wrapped)
        torch.testing.assert_close(torch.Tensor(got), F.cross_entropy(X, Y))
        assert F.cross_entropy(X.to("meta"), Y.to("meta")).device.type == "meta"
        assert torch.equal(F.cross_entropy(X, P.to_sparse()), without)
        with pytest.raises(NotImplementedError, match="SparseCPU"):
            F.cross_entropy(X.to_sparse(), Y)
        for bad in (X.long(), X.to(torch.complex64), X.to(torch.float8_e4m3fn)):
            with pytest.raises((NotImplementedError, RuntimeError)):
                F.cross_entropy(bad, Y)


def test_errors_are_torchs_types() -> None:
    for args, kwargs in (
        ((X, torch.tensor([0, 1])), {}),
        ((X, Y.int()), {}),
        ((X, torch.tensor([0, 1, 9, 2])), {}),
        ((X, Y), {"weight": torch.rand(3)}),
        ((X, Y), {"label_smoothing": 2.0}),
        ((X, torch.rand(4, 5)), {"ignore_index": 2}),
        ((X, [0, 1, 2, 3]), {}),
    ):
        with pytest.raises(Exception) as theirs:
            F.cross_entropy(*args, **kwargs)
        with softce.installed(), pytest.raises(theirs.type):
            F.cross_entropy(*args, **kwargs)


# ---- torch.compile ----


@pytest.fixture
def _fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def compiled_loss(model: nn.Module) -> Any:
    return torch.compile(lambda x: F.cross_entropy(model(x), Y), backend="aot_eager", fullgraph=True)


def test_compile_with_it_installed(_fresh_compiler: None) -> None:
    """The kernels are in the graph; what was compiled before keeps working."""
    x = X.clone().requires_grad_()
    model = nn.Linear(5, 7)
    want = F.cross_entropy(model(x), Y)
    (want_grad,) = torch.autograd.grad(want, x)
    with softce.installed():
        compiled = compiled_loss(model)
        loss = compiled(x)
        torch.testing.assert_close(loss, want)
        torch.testing.assert_close(torch.autograd.grad(loss, x)[0], want_grad)
        assert ran(lambda: compiled(x).backward())
    torch.testing.assert_close(compiled(x), want)


def test_graphs_follow_in_and_out(_fresh_compiler: None) -> None:
    """What a tracer found while it was out is not what runs once it is in, nor the other way round."""
    x = X.clone().requires_grad_()
    for _ in range(2):
        for inside in (False, True):
            torch._dynamo.reset()
            if inside:
                softce.install()
            compiled = compiled_loss(nn.Linear(5, 7))
            compiled(x).backward()
            assert ran(lambda: compiled(x).backward()) == inside  # noqa: B023
            softce.uninstall()


# ---- python -m softce run; that the script's calls run on the kernels is in test_package.py ----


AS_PYTHON = """
import atexit, os, pickle, sys
class Job: pass
atexit.register(lambda: print(type(pickle.loads(pickle.dumps(Job()))) is Job, sys.argv))
os.chdir("/")
print(__name__, __file__, open(__file__).readline() == chr(10), sys.argv, sys.path[0])
"""


def test_run_is_as_python_would(tmp_path: Path) -> None:
    """A script that changes its folder finds its own; it is ``__main__`` until the process ends."""
    (tmp_path / "job.py").write_text(AS_PYTHON)
    environment = {**os.environ, "PYTHONPATH": str(Path(softce.__file__).parent.parent)}
    got, want = (
        subprocess.run(
            [sys.executable, *ways, "./job.py", "-x", "1"],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for ways in (["-m", "softce", "run"], [])
    )
    assert got == want and got.splitlines()[-1] == "True ['./job.py', '-x', '1']"
    (tmp_path / "app").mkdir()
    (tmp_path / "app" / "__main__.py").write_text("import part; print(__file__, part.__name__)")
    (tmp_path / "app" / "part.py").write_text("")
    command = [sys.executable, "-m", "softce", "run", "app"]
    folder = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True)
    assert folder.stdout == f"{tmp_path / 'app' / '__main__.py'} part\n"


def test_run_passes_on_exit_status_and_errors(tmp_path: Path) -> None:
    (tmp_path / "job.py").write_text("raise SystemExit(7)")
    command = [sys.executable, "-m", "softce", "run"]
    root = {**os.environ, "PYTHONPATH": str(Path(softce.__file__).parent.parent)}
    assert subprocess.run([*command, "job.py"], cwd=tmp_path, env=root, check=False).returncode == 7
    missing = subprocess.run(
        [*command, "nothing.py"], cwd=tmp_path, env=root, capture_output=True, text=True, check=False
    )
    assert missing.returncode != 0 and "nothing.py" in missing.stderr

# SPDX-License-Identifier: BSD-3-Clause
"""PyTorch's own tests of cross-entropy, run on softce by its names and, installed, by torch's.

What PyTorch ships of them: the OpInfo of ``nn.functional.cross_entropy`` and the ModuleInfo of ``nn.CrossEntropyLoss``
(sample inputs, error inputs, reference functions, what is to be supported), and the reference functions of
``torch.testing._internal.common_nn``. How they are driven is written here.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from checks import kernel_calls
from pytorch_ways import REFERENCE, WAYS, Way, softce_off, take
from torch import Tensor, nn
from torch.autograd import gradcheck, gradgradcheck

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of what torch's own test helpers import
    from torch.testing._internal.common_methods_invocations import op_db
    from torch.testing._internal.common_modules import module_db

OP = next(op for op in op_db if op.name == "nn.functional.cross_entropy")
MODULE = next(module for module in module_db if module.module_cls is nn.CrossEntropyLoss)
D = torch.float64
FLOATS = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
# These tests are about the kernels; the formula is covered by the others.
pytestmark = pytest.mark.usefixtures("cpu_kernels")


@pytest.fixture(params=WAYS)
def way(request: pytest.FixtureRequest) -> Iterator[Way]:
    with take(request.param) as way:
        yield way


def samples(dtype: torch.dtype, requires_grad: bool = True) -> list[Any]:
    torch.manual_seed(0)
    return list(OP.sample_inputs("cpu", dtype, requires_grad=requires_grad))


def differentiable(sample: Any) -> tuple[Tensor, ...]:
    return tuple(x for x in (sample.input, *sample.args) if isinstance(x, Tensor) and x.requires_grad)


def tolerances(dtype: torch.dtype) -> dict[str, float]:
    """What torch.testing takes for the dtype; its reference functions round at every step in half precision."""
    return {torch.float16: {"rtol": 1e-3, "atol": 3e-2}, torch.bfloat16: {"rtol": 1.6e-2, "atol": 3e-2}}.get(dtype, {})


# ---- OpInfo ----


@pytest.mark.parametrize("dtype", FLOATS)
def test_op_sample_inputs(way: Way, dtype: torch.dtype) -> None:
    """Values and gradients of every sample equal torch's, noncontiguous and gradient-less ones too."""
    assert dtype in OP.supported_dtypes("cpu")
    for sample in samples(dtype):
        for s in (sample, sample.noncontiguous()):
            with kernel_calls() as calls:
                got = way.function(s.input, *s.args, **s.kwargs)
            assert calls, "no kernel ran"
            inputs = differentiable(s)
            upstream = torch.randn_like(got)
            got_grads = torch.autograd.grad(got, inputs, upstream)
            with softce_off(way):
                want = OP(s.input, *s.args, **s.kwargs)
                want_grads = torch.autograd.grad(want, inputs, upstream)
            torch.testing.assert_close(got, want, **tolerances(dtype))
            torch.testing.assert_close(got_grads, want_grads, **tolerances(dtype))
            with torch.no_grad():
                torch.testing.assert_close(way.function(s.input, *s.args, **s.kwargs), got.detach())


def test_op_reference_inputs(way: Way) -> None:
    """The reference function of common_nn on every sample."""
    for sample in samples(D, requires_grad=False):
        got = way.function(sample.input, *sample.args, **sample.kwargs)
        torch.testing.assert_close(got, REFERENCE(sample.input, *sample.args, **sample.kwargs))


def test_op_gradients(way: Way) -> None:
    """gradcheck and gradgradcheck as PyTorch's test_ops_gradients.py asks: batched and forward-mode ones included."""
    assert OP.supports_forward_ad and OP.supports_fwgrad_bwgrad and OP.supports_gradgrad
    for sample in samples(D):
        inputs = differentiable(sample)

        def function(*given: Tensor, sample: Any = sample) -> Tensor:
            rest = iter(given)
            args = [
                next(rest) if isinstance(x, Tensor) and x.requires_grad else x for x in (sample.input, *sample.args)
            ]
            out: Tensor = way.function(*args, **sample.kwargs)
            return out

        common = {"check_batched_grad": OP.check_batched_grad, "nondet_tol": OP.gradcheck_nondet_tol}
        common["fast_mode"] = way.name == "installed"  # the same derivatives once more
        assert gradcheck(
            function,
            inputs,
            **common,
            check_grad_dtypes=True,
            check_forward_ad=OP.supports_forward_ad,
            check_batched_forward_grad=OP.check_batched_forward_grad,
            check_undefined_grad=True,
        )
        assert gradgradcheck(
            function,
            inputs,
            check_batched_grad=OP.check_batched_gradgrad,
            nondet_tol=OP.gradcheck_nondet_tol,
            check_grad_dtypes=True,
            fast_mode=True,
        )
        assert gradgradcheck(
            function,
            inputs,
            check_fwd_over_rev=True,
            check_rev_over_rev=False,
            check_undefined_grad=False,
            fast_mode=True,
        )


def test_op_error_inputs(way: Way) -> None:
    """The OpInfo has none of its own today; the loop stands for the day it does."""
    if OP.error_inputs_func is None:
        return
    for error in OP.error_inputs("cpu"):
        with pytest.raises(error.error_type, match=error.error_regex):
            way.function(error.sample_input.input, *error.sample_input.args, **error.sample_input.kwargs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_op_compiles_and_traces(way: Way, dtype: torch.dtype) -> None:
    """A sample of each kind under torch.compile (aot_eager: forward and backward graphs) gives what eager gives."""
    torch._dynamo.reset()
    for sample in samples(dtype)[::6]:
        compiled = torch.compile(
            lambda *args, sample=sample: way.function(*args, **sample.kwargs), backend="aot_eager", fullgraph=True
        )
        inputs = differentiable(sample)
        got = compiled(sample.input, *sample.args)
        want = way.function(sample.input, *sample.args, **sample.kwargs)
        torch.testing.assert_close(got, want)
        torch.testing.assert_close(
            torch.autograd.grad(got.sum(), inputs), torch.autograd.grad(want.sum(), inputs), **tolerances(dtype)
        )


def test_op_on_meta_and_fake_tensors(way: Way) -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    for sample in samples(torch.float32):
        want = way.function(sample.input, *sample.args, **sample.kwargs)
        for move in (lambda t: t.to("meta"), FakeTensorMode(allow_non_fake_inputs=True).from_tensor):
            moved = sample.transform(lambda t, move=move: move(t) if isinstance(t, Tensor) else t)
            out = way.function(moved.input, *moved.args, **moved.kwargs)
            assert (out.shape, out.dtype, out.stride()) == (want.shape, want.dtype, want.stride())


# ---- ModuleInfo ----


def module_inputs(dtype: torch.dtype, requires_grad: bool = False) -> list[Any]:
    torch.manual_seed(0)
    return list(
        MODULE.module_inputs_func(MODULE, device="cpu", dtype=dtype, requires_grad=requires_grad, training=False)
    )


def build(way: Way, module_input: Any, dtype: torch.dtype) -> nn.CrossEntropyLoss:
    constructor = module_input.constructor_input
    return way.module(*constructor.args, **constructor.kwargs).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, D, torch.float16])
def test_module_forward(way: Way, dtype: torch.dtype) -> None:
    """Every module input against its reference function."""
    assert dtype in MODULE.dtypes
    for module_input in module_inputs(dtype):
        constructor, (x, t) = module_input.constructor_input, module_input.forward_input.args
        module = build(way, module_input, dtype)
        got, want = module(x, t), module_input.reference_fn(module, x, t)
        if dtype == torch.float16 and not torch.allclose(got, want, **tolerances(dtype), equal_nan=True):
            # The reference rounds at every step here. Where the two differ by more, softce is the one that is right.
            kwargs = {k: v.to(D) if isinstance(v, Tensor) else v for k, v in constructor.kwargs.items()}
            with softce_off(way):
                exact = nn.CrossEntropyLoss(**kwargs)(x.to(D), t.to(D) if t.is_floating_point() else t)
            assert (got - exact).abs().max() < 0.5 * (want - exact).abs().max()
            want = exact.to(dtype)
        torch.testing.assert_close(
            got,
            want,
            **tolerances(dtype),
            equal_nan=True,  # a sample whose two rows are both ignored
            msg=lambda text, module_input=module_input: f"{module_input.desc}: {text}",
        )


def test_module_gradients(way: Way) -> None:
    """gradcheck of every module input, gradgradcheck of those with few elements."""
    checked = 0
    for module_input in module_inputs(D, requires_grad=True):
        module, forward = build(way, module_input, D), module_input.forward_input
        inputs = tuple(
            x.detach().requires_grad_() for x in forward.args if isinstance(x, Tensor) and x.is_floating_point()
        )
        if sum(x.numel() for x in inputs) > 64:
            continue
        rest = forward.args[len(inputs) :]

        def function(*given: Tensor, module: nn.Module = module, rest: Any = rest) -> Tensor:
            out: Tensor = module(*given, *rest)
            return out

        if function(*inputs).isfinite().all():  # else both rows of the sample are ignored
            assert gradcheck(function, inputs, check_forward_ad=True, fast_mode=True)
            assert gradgradcheck(function, inputs, fast_mode=True)
            checked += 1
    assert checked > 20


def test_module_noncontiguous_inputs(way: Way) -> None:
    """Forward and gradients do not depend on strides."""
    from torch.testing._internal.common_utils import noncontiguous_like

    for module_input in module_inputs(torch.float32, requires_grad=True):
        module, (x, t) = build(way, module_input, torch.float32), module_input.forward_input.args
        x, t = x.detach(), t.detach()
        results = []
        odd_x, odd_t = noncontiguous_like(x), noncontiguous_like(t)
        for a, b in ((x, t), (odd_x, t), (x, odd_t), (odd_x, odd_t)):
            a = a.requires_grad_()
            out = module(a, b)
            results.append((out.detach(), torch.autograd.grad(out.sum(), a)[0]))
        for other in results[1:]:
            torch.testing.assert_close(other, results[0], equal_nan=True)


def test_module_errors(way: Way) -> None:
    if MODULE.module_error_inputs_func is None:
        pytest.skip("this torch has no error inputs for CrossEntropyLoss")
    errors = MODULE.module_error_inputs_func(
        MODULE, device="cpu", dtype=torch.float32, requires_grad=False, training=False
    )
    assert errors
    for error in errors:
        made = error.module_error_input
        module, forward = build(way, made, torch.float32), made.forward_input
        with pytest.raises(error.error_type, match=error.error_regex):
            module(*forward.args, **forward.kwargs)


def test_module_repr_pickle_and_state(way: Way) -> None:
    import copy
    import pickle

    for module_input in module_inputs(torch.float32):
        module, forward = build(way, module_input, torch.float32), module_input.forward_input
        assert isinstance(repr(module), str)
        want = module(*forward.args)
        for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
            torch.testing.assert_close(other(*forward.args), want, rtol=0, atol=0, equal_nan=True)

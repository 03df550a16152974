# SPDX-License-Identifier: BSD-3-Clause
"""The Triton kernels in Triton's interpreter, on CPU tensors: no GPU needed, every operator, option and layout.

The interpreter has to be chosen before the kernels are imported, so the tests of this file run in a process of their
own, with ``TRITON_INTERPRET=1`` and without the C++ kernels, in whose place the Triton implementations are registered:
``softce.cross_entropy`` then runs on them as it would on a GPU. Loss and gradient are held against the float64 oracle
(tests/oracle.py) over the shared table of cases, single operators against the reference formula in float64.
"""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from interpreter import environment, skip_where_broken

HERE = Path(__file__).resolve()
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
WITHOUT = next((name for name in ("triton", "numpy") if importlib.util.find_spec(name) is None), None)

if WITHOUT:
    pytest.skip(f"{WITHOUT} is not installed", allow_module_level=True)

if not INTERPRETED:

    def test_in_the_interpreter(request: pytest.FixtureRequest, tmp_path: Path) -> None:
        """Runs this file again, interpreted."""
        skip_where_broken(tmp_path)
        library = os.devnull + "/none"
        command = [sys.executable, "-m", "pytest", "-o", "addopts=", "-q", "-x", "-p", "no:cacheprovider", str(HERE)]
        expression = request.config.getoption("markexpr")
        if expression:
            command += ["-m", expression]
        result = subprocess.run(
            command,
            env={**environment(), "SOFTCE_LIBRARY": library},
            capture_output=True,
            text=True,
            cwd=HERE.parents[1],
        )
        assert result.returncode == 0, result.stdout[-6000:] + result.stderr[-2000:]
        passed = re.search(r"(\d+) passed", result.stdout)
        assert passed and int(passed[1]) > 100, result.stdout[-500:]

else:
    import oracle
    import torch
    from cases import Case, cases
    from checks import EPS, assert_rounded_once, run, same
    from kernel_truth import Truth, assert_gradient, assert_stats, opposed
    from torch import Tensor

    import softce
    from softce import backends, ops, reference
    from softce.backends import gpu, triton_configs
    from softce.backends import triton as backend
    from softce.backends.triton_configs import Config
    from softce.ops import KernelTarget, Spec

    gpu.register("CPU")
    # The operators for CPU tensors are there, the Triton ones; the GPU that is missing is not needed.
    backends._reasons.update(cpu=[], triton=[])
    backends._reasons["cuda"] = ["not in the interpreter"]

    ALL = list(cases())

    @pytest.fixture(autouse=True)
    def _one_thread() -> Iterator[None]:
        torch.set_num_threads(1)
        yield

    def check_case(case: Case, dtype: torch.dtype) -> None:
        input, target, kwargs = case.make("cpu", dtype)
        before = backend.LAUNCHES["row_kernel"]
        loss, grad = run(softce.cross_entropy, input, target, **kwargs)
        launches = backend.LAUNCHES["row_kernel"] - before
        assert launches, "no kernel ran"
        want = oracle.evaluate(input, target, **kwargs)
        what = f"{case.name} {dtype}"
        if dtype == torch.bfloat16:
            # The interpreter cuts float32 to bfloat16 where a GPU rounds: a whole unit in the last place.
            for got, exact in ((loss, want.loss), (grad, want.grad)):
                floor = 1e-6 * float(exact.abs().nan_to_num().max()) if exact.numel() else 0.0
                torch.testing.assert_close(
                    got.double(), exact, rtol=1.01 * EPS[dtype], atol=floor, msg=lambda m: f"{what}: {m}"
                )
            return
        assert_rounded_once(loss, want.loss, what=f"{what} loss", logits_dtype=dtype)
        scale = want.grad_scale
        if case.reduction == "none":
            # row_grad gets lse rounded to the accumulation dtype: exp(y - lse) is off by an ulp of lse, not of 1.
            scale *= max(1.0, float(want.lse.abs().max()) / 8)
        assert_rounded_once(grad, want.grad, what=f"{what} gradient", scale=scale)

    @pytest.mark.parametrize("case", ALL, ids=lambda case: case.name)
    def test_case(case: Case) -> None:
        check_case(case, torch.float32)

    @pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16], ids=str)
    @pytest.mark.parametrize("case", ALL[::9], ids=lambda case: case.name)
    def test_case_of_other_dtypes(case: Case, dtype: torch.dtype) -> None:
        check_case(case, dtype)

    # ---- single operators against the reference formula in float64, under configurations of every kind ----

    def tensors(shape: tuple[int, ...], dtype: torch.dtype, form: str) -> tuple[Tensor, KernelTarget, Spec]:
        """Logits with an outlier a row, a target with padding, ignored rows and duplicates, every option at once."""
        g = torch.Generator().manual_seed(len(form) + shape[1])
        rows, classes = shape[0] * (shape[2] if len(shape) == 3 else 1), shape[1]
        acc = ops.acc_dtype(dtype)
        logits = 2 * torch.randn(shape, generator=g)
        logits[:, classes // 2] += 9
        index = torch.randint(classes, (rows, 3), generator=g)
        index[:, 1] = index[:, 0]
        index[::4, 2] = -100
        index[2::5] = -100
        value = torch.rand(rows, 3, generator=g).to(acc)
        rest = 0.1 * torch.rand(rows, generator=g).to(acc)
        weight = torch.rand(classes, generator=g).to(acc)
        weight[classes // 3] = 0.0
        dense = torch.rand(shape, generator=g).to(acc)
        teacher = (3 * torch.randn(shape, generator=g)).to(dtype)
        full = Spec(0.9, 0.01, 1.3, 5.0, 0.01, scale=0.7)
        target, spec = {
            "indices": (KernelTarget(index[:, :1].contiguous()), Spec()),
            "weighted": (KernelTarget(index[:, :1].contiguous(), weight=weight), full),
            "entries": (KernelTarget(index, value), Spec(temperature=0.7)),
            "rest": (KernelTarget(index, value, rest, weight=weight), full),
            "dense": (KernelTarget(dense=dense, weight=weight), full),
            "teacher": (KernelTarget(dense=teacher), Spec(dense_kind=1.0, dense_temperature=2.0)),
            "weighted_teacher": (
                KernelTarget(dense=teacher, weight=weight),
                full._replace(dense_kind=1.0, dense_temperature=0.5),
            ),
        }[form]
        return logits.to(dtype), target, spec

    FORMS = ("indices", "weighted", "entries", "rest", "dense", "teacher", "weighted_teacher")
    # Rows and planes, on chip and swept, one row and several a tile, pipelined, fewer programs than tiles.
    SETTINGS = (
        ((3, 140), Config(1, 256, 4), torch.float32),
        ((3, 140), Config(1, 64, 4, stages=2, per_sm=1), torch.float32),
        ((2, 70, 3), Config(4, 128, 4), torch.float64),
        ((2, 70, 3), Config(2, 32, 4, per_sm=1), torch.float64),
    )

    def double(target: KernelTarget) -> KernelTarget:
        return KernelTarget(*(t if t is None or not t.is_floating_point() else t.double() for t in target))

    def close(got: Tensor, want: Tensor, dtype: torch.dtype, what: str) -> None:
        tolerance = {torch.float32: 2e-6, torch.float64: 1e-13, torch.float16: 2e-6}[dtype]
        scale = float(want[want.isfinite()].abs().max()) if want.isfinite().any() else 1.0
        rtol = EPS[got.dtype] if got.dtype == torch.float16 else tolerance
        torch.testing.assert_close(
            got.double(), want.double(), rtol=rtol, atol=tolerance * max(1.0, scale), equal_nan=True,
            msg=lambda m: f"{what}: {m}",
        )  # fmt: skip

    @pytest.mark.parametrize("setting", SETTINGS, ids=lambda s: f"{s[0]}-{s[1].rows}x{s[1].block}")
    @pytest.mark.parametrize("form", FORMS)
    def test_operators(form: str, setting: tuple[tuple[int, ...], Config, torch.dtype]) -> None:
        """Statistics with extras, fused loss and gradient, and row_grad with three coefficients."""
        shape, config, dtype = setting
        logits, target, spec = tensors(shape, dtype, form)
        arguments = (*target, -100, list(spec))
        leaf = logits.double().requires_grad_()
        want = reference.row_stats(leaf, double(target), -100, spec, True)
        row_weight = torch.rand(want.shape[1]).to(ops.acc_dtype(dtype))
        valid = want[ops.COUNT] > 0
        total = (want[ops.LOSS] * row_weight.double())[valid].sum() * spec.scale
        total = total / (want[ops.COUNT] * row_weight.double()).sum()
        (want_grad,) = torch.autograd.grad(total, leaf, retain_graph=True)
        coef = torch.randn(3, want.shape[1]).to(ops.acc_dtype(dtype))
        coef[:, ::3] = 0.0

        with triton_configs.forced(config):
            stats = ops.row_stats(logits, *arguments, True)
            loss, dlogits, again = ops.row_fused(logits, *target, row_weight, -100, list(spec), True, True)
            grad = ops.row_grad(logits, stats[ops.LSE].contiguous(), coef, *arguments)
            over = logits.clone()
            ops.row_grad_(over, stats[ops.LSE].contiguous(), coef, *arguments)
        close(stats, want.detach(), dtype, "stats")
        assert same(stats, again)
        close(loss, total.detach(), dtype, "loss")
        close(dlogits, want_grad, dtype, "dlogits")
        assert same(grad, over), "in place differs"
        close(grad, row_grad_by_formula(leaf.detach(), double(target), spec, coef.double()), dtype, "row_grad")

    def row_grad_by_formula(x: Tensor, target: KernelTarget, spec: Spec, coef: Tensor) -> Tensor:
        """(p * (A + B y) - D q) * dy/dx, with q read off the gradient of the reference's loss."""
        leaf = x.requires_grad_()
        y = reference.transform(leaf, spec)
        stats = reference.row_stats(leaf, target, -100, spec._replace(z_loss=0.0))
        (dloss,) = torch.autograd.grad(stats[ops.LOSS].sum(), leaf, retain_graph=True)
        (slope,) = torch.autograd.grad(y.sum(), leaf)
        dloss, slope, y = (reference.as_rows(t).detach() for t in (dloss, slope, y))
        a, d, b = coef[:, :, None]
        p = torch.softmax(y, 1)
        q_slope = stats[ops.MASS].detach()[:, None] * p * slope - dloss  # q * dy/dx
        counted = torch.ones(len(y), dtype=torch.bool)
        if target.index is not None:
            counted = (target.index != -100).any(1)
        rows = torch.where(counted[:, None], p * (a + b * y) * slope - d * q_slope, 0.0)
        return rows if x.dim() == 2 else rows.reshape(x.shape[0], x.shape[2], x.shape[1]).movedim(2, 1)

    def test_no_host_reads() -> None:
        """What a call launches depends on shapes alone: tensors without data do."""
        logits = torch.empty(64, 128256, dtype=torch.bfloat16, device="meta")
        index = torch.empty(64, 1, dtype=torch.int64, device="meta")
        launched = []
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(backend, "_launch", lambda kernel, programs, *_, **__: launched.append(kernel.__name__))
            backend.row_fused(logits, index, None, None, None, None, None, -100, list(Spec()), True, False)
        assert launched == ["count_kernel", "row_kernel", "loss_kernel"]

    @pytest.mark.parametrize("block", [64, 512])
    def test_a_reference_far_from_the_maximum(block: int) -> None:
        """Later blocks beyond what exp of the first block's maximum can hold; first blocks of -inf alone."""
        x = torch.randn(5, 300)
        x[0, 200] = 300.0
        x[1, :64] = -torch.inf
        x[2, :64] = -torch.inf
        x[2, 64:] -= 1000.0
        x[3] += 5e4
        x[4, 250:] = torch.linspace(0, 3e3, 50)
        index = torch.tensor([[200], [100], [299], [0], [299]])
        want = reference.row_stats(x.double(), KernelTarget(index), -100, Spec(), True)
        with triton_configs.forced(Config(1, block, 4)):
            stats = ops.row_stats(x, *KernelTarget(index), -100, list(Spec()), True)
            teacher = ops.row_stats(x, None, None, None, x.clone(), None, -100, list(Spec(dense_kind=1.0)), True)
        torch.testing.assert_close(stats.double(), want, rtol=1e-6, atol=1e-5)
        spec = Spec(dense_kind=1.0)
        want = reference.row_stats(x.double(), KernelTarget(dense=x.double()), -100, spec, True)
        torch.testing.assert_close(teacher.double(), want, rtol=1e-6, atol=1e-5)

    @pytest.mark.parametrize("block", [16, 64])
    def test_edges(block: int) -> None:
        """-inf, +inf, nan, rows that are ignored whatever they hold."""
        inf, nan = torch.inf, torch.nan
        x = torch.randn(7, 50)
        x[0, 3] = -inf  # not the target
        x[1, 3] = -inf  # the target: loss inf, finite gradient
        x[2] = -inf  # nan
        x[3, 40] = inf  # nan
        x[4, 40] = nan
        x[5] = nan  # ignored
        index = torch.tensor([[0], [3], [1], [1], [1], [-100], [2]])
        with triton_configs.forced(Config(2, block, 4)):
            loss, dlogits, stats = ops.row_fused(x, *KernelTarget(index), None, -100, list(Spec()), False, False)
        assert stats[0].isnan().tolist() == [False, False, True, True, True, False, False]
        assert stats[0, 1] == inf and stats[1, 2] == -inf and stats[:, 5].eq(0).all() and loss.isnan()
        assert dlogits.isnan().all(1).tolist() == [False, False, True, True, True, False, False]
        assert dlogits[5].eq(0).all() and dlogits[[0, 1, 6]].isfinite().all()

    def test_without_statistics() -> None:
        x, index = torch.randn(7, 50), torch.arange(7).unsqueeze(1)
        want = ops.row_fused(x, *KernelTarget(index), None, -100, list(Spec()), True, False)
        got = ops.row_fused(x, *KernelTarget(index), None, -100, list(Spec()), True, False, want_stats=False)
        assert same(got[0], want[0]) and same(got[1], want[1]) and got[2].shape == (0, 7)

    @pytest.mark.parametrize("config", [Config(4, 16, 4), Config(2, 8, 4)], ids=lambda c: f"{c.rows}x{c.block}")
    @pytest.mark.parametrize("kind", ["indices", "topk", "probs", "teacher"])
    def test_a_masked_class_whose_weight_has_parts_of_both_signs(kind: str, config: Config) -> None:
        """Only their sum counts: 0 * (-inf) is 0, and what is left over has one infinity."""
        x = torch.randn(4, 12)
        x[1:3, 3] = -torch.inf
        for e, infinite in ((0.0, None), (0.125, torch.inf), (-0.0625, -torch.inf)):
            target, spec = opposed(kind, x, e)
            truth = Truth(x, target, spec)
            with triton_configs.forced(config):
                loss, dlogits, stats = ops.row_fused(x, *target, None, -100, list(spec), True, True)
            masked = stats[ops.LOSS, 1:3]
            assert bool((masked.isfinite() if infinite is None else masked == infinite).all()), f"{e}: {masked}"
            want_loss, want, push = truth.fused(None, True)
            assert_stats(stats, truth, x.dtype, "stats")
            assert_gradient(dlogits, want, "dlogits", push)
            torch.testing.assert_close(loss.double(), want_loss, rtol=1e-6, atol=1e-6)

    @pytest.mark.parametrize("bad", [-1, 50, 2**40])
    @pytest.mark.parametrize("entries", [1, 3])
    def test_class_out_of_range(bad: int, entries: int) -> None:
        """NaN in that row alone; nothing is read or written there (the interpreter would crash)."""
        x, index = torch.randn(4, 50), torch.randint(50, (4, entries))
        index[1, -1], index[3] = bad, -100
        weight = torch.rand(50)
        loss, dlogits, stats = ops.row_fused(x, index, None, None, None, weight, None, -100, list(Spec()), True, False)
        assert loss.isnan() and stats[0].isnan().tolist() == [False, True, False, False]
        assert dlogits.isnan().all(1).tolist() == [False, True, False, False]

    @pytest.mark.parametrize("empty", [False, True])
    def test_nothing_counts(empty: bool) -> None:
        x, index = torch.randn(0 if empty else 3, 5), torch.full((0 if empty else 3, 1), -100)
        for spec, mean, want in ((Spec(), True, torch.nan), (Spec(), False, 0.0), (Spec(empty_zero=1.0), True, 0.0)):
            loss, dlogits, _ = ops.row_fused(x, *KernelTarget(index), None, -100, list(spec), mean, False)
            torch.testing.assert_close(loss, torch.tensor(want), equal_nan=True)
            assert dlogits.eq(0).all()

    def test_wide_offsets() -> None:
        """64-bit offsets within a row: the same values as 32-bit ones."""
        logits, target, spec = tensors((2, 150, 3), torch.float32, "rest")
        want = ops.row_fused(logits, *target, None, -100, list(spec), True, True)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(backend, "_spans_31_bits", lambda tensor: True)
            got = ops.row_fused(logits, *target, None, -100, list(spec), True, True)
        assert all(same(a, b) for a, b in zip(got, want, strict=True))

    def test_checks_name_the_argument() -> None:
        x, index = torch.randn(4, 5), torch.zeros(4, 1, dtype=torch.int64)
        spec = list(Spec())
        for target, message in (
            (KernelTarget(index.int()), r"index must be torch.int64, got torch.int32"),
            (KernelTarget(index[:3]), r"index must have shape \(4, 1\), got \(3, 1\)"),
            (KernelTarget(index, weight=torch.ones(4)), r"weight must have shape \(5,\), got \(4,\)"),
            (KernelTarget(), r"exactly one of index .* got neither"),
            (KernelTarget(dense=x[:, :4]), r"dense must have the logits' shape"),
            (KernelTarget(index, rest=torch.ones(8)[::2]), r"rest must be contiguous"),
        ):
            with pytest.raises(RuntimeError, match=message):
                ops.row_stats(x, *target, -100, spec, False)
        with pytest.raises(RuntimeError, match="must not overlap themselves"):
            ops.row_fused_(x[:1].expand(4, 5), *KernelTarget(index), None, -100, spec, True, False)
        with pytest.raises(RuntimeError, match="dense must not share memory with the logits"):
            ops.row_fused_(x, *KernelTarget(dense=x), None, -100, spec, True, False)

# SPDX-License-Identifier: BSD-3-Clause
"""The operators as operators: torch's own opcheck, fake against real outputs, and every refusal of a bad argument.

What they compute is compared with the reference in test_kernels.py.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from checks import threads
from torch import Tensor

import softce
from softce import ops

pytestmark = pytest.mark.usefixtures("cpu_kernels")

R, C, B, S = 6, 7, 2, 3  # rows (R, C) and planes (B, C, S) have as many rows
OPERATORS = {name: getattr(torch.ops.softce, name).default for name in
             ("row_stats", "row_grad", "row_grad_", "row_fused", "row_fused_")}  # fmt: skip

Arguments = dict[str, Any]


def target(kind: str, logits: Tensor) -> Arguments:
    """The five target tensors of an operator call."""
    acc = ops.acc_dtype(logits.dtype)
    rows, classes = ops.rows_of(logits), logits.shape[1]
    given: Arguments = dict.fromkeys(ops.KernelTarget._fields)
    if kind == "classes":
        given["index"] = (torch.arange(rows) % classes).unsqueeze(1)
        given["index"][1:2] = -100  # a row that is ignored
    elif kind == "entries":
        given["index"] = torch.stack([(torch.arange(rows) * k) % classes for k in (1, 2, 3)], 1)
        given["value"] = torch.rand(rows, 3, dtype=acc)
        given["rest"] = torch.rand(rows, dtype=acc) / classes
        given["weight"] = torch.rand(classes, dtype=acc) + 0.5
    else:
        dtype = logits.dtype if kind == "dense" else acc
        given["dense"] = torch.rand(logits.shape, dtype=acc).softmax(1).to(dtype)
    return given


def arguments(name: str, logits: Tensor, kind: str = "classes", extras: bool = False, mean: bool = True) -> Arguments:
    """All arguments of the operator ``name``."""
    acc, rows = ops.acc_dtype(logits.dtype), ops.rows_of(logits)
    call: Arguments = {"logits": logits}
    if "grad" in name:
        call |= {"lse": logits.double().logsumexp(1).flatten().to(acc)}
        call |= {"coef": torch.rand(3 if extras else 2, rows, dtype=acc)}
    call |= target(kind, logits)
    if "fused" in name:
        call |= {"row_weight": torch.rand(rows, dtype=acc) if extras else None}
    call |= {"ignore_index": -100, "spec": list(ops.Spec(mix_a=0.9, mix_b=0.1 / C, temperature=1.5))}
    if "fused" in name:
        call |= {"mean": mean}
    if "grad" not in name:
        call |= {"extras": extras}
    return call


LAYOUTS: dict[str, Callable[[torch.dtype], Tensor]] = {
    "rows": lambda dtype: torch.randn(R, C, dtype=dtype),
    "apart": lambda dtype: torch.randn(R, C + 5, dtype=dtype)[:, :C],
    "planes": lambda dtype: torch.randn(B, C, S, dtype=dtype),
    "planes-apart": lambda dtype: torch.randn(B, C + 2, S + 3, dtype=dtype)[:, :C, :S],
    "one-position": lambda dtype: torch.randn(B * S, C, 4, dtype=dtype)[:, :, :1],
    "class-by-class": lambda dtype: torch.randn(C, R, dtype=dtype).unsqueeze(0),
}


@pytest.mark.parametrize("name", OPERATORS)
@pytest.mark.parametrize("kind", ["classes", "entries", "dense"])
@pytest.mark.parametrize("layout", ["rows", "planes"])
@pytest.mark.parametrize("extras", [False, True])
def test_opcheck(name: str, kind: str, layout: str, extras: bool) -> None:
    torch.library.opcheck(OPERATORS[name], (), arguments(name, LAYOUTS[layout](torch.float32), kind, extras))


@pytest.mark.parametrize("kind", ["classes", "dense"])
@pytest.mark.parametrize("layout", ["rows", "planes"])
@pytest.mark.parametrize("extras", [False, True])
def test_without_statistics(kind: str, layout: str, extras: bool) -> None:
    """Loss and gradient are the same, and the statistics have no row."""
    call = arguments("row_fused", LAYOUTS[layout](torch.float32), kind, extras)
    loss, dlogits, _ = ops.row_fused(**call | {"extras": False})  # extras that nobody wants are not computed
    got = ops.row_fused(**call, want_stats=False)
    assert torch.equal(got[0], loss) and torch.equal(got[1], dlogits) and got[2].shape == (0, R)
    torch.library.opcheck(ops.row_fused, (), call | {"want_stats": False})


@pytest.mark.parametrize("kind", ["classes", "entries", "dense"])
def test_opcheck_with_gradient(kind: str) -> None:
    logits = LAYOUTS["rows"](torch.float32).requires_grad_()
    torch.library.opcheck(OPERATORS["row_stats"], (), arguments("row_stats", logits, kind))


def facts(result: Any) -> list[tuple[Any, ...]]:
    tensors = [] if result is None else [result] if isinstance(result, Tensor) else list(result)
    return [(tuple(t.shape), t.dtype, t.stride(), t.device.type) for t in tensors]


@pytest.mark.parametrize("name", OPERATORS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_fake_outputs_are_like_the_real_ones(name: str, dtype: torch.dtype, layout: str) -> None:
    for extras, kind in ((False, "classes"), (True, "entries"), (True, "dense"), (False, "wide")):
        call = arguments(name, LAYOUTS[layout](dtype), kind, extras)
        meta = {k: v.to("meta") if isinstance(v, Tensor) else v for k, v in call.items()}
        expected = [(*fact[:3], "cpu") for fact in facts(OPERATORS[name](**meta))]
        assert facts(OPERATORS[name](**call)) == expected


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", ["classes", "entries", "dense", "wide"])
def test_in_place_is_the_same(dtype: torch.dtype, layout: str, kind: str) -> None:
    for name in ("row_fused", "row_grad"):
        logits = LAYOUTS[layout](dtype)
        call = arguments(name, logits, kind, extras=True)
        whole = logits if logits._base is None else logits._base
        before = whole.clone()
        expected = OPERATORS[name](**call)
        assert torch.equal(whole, before), "the logits are only read"
        result = OPERATORS[f"{name}_"](**call)
        if name == "row_grad":
            assert torch.equal(logits, expected)
        else:
            assert torch.equal(logits, expected[1])
            assert torch.equal(result[0], expected[0])
            assert torch.equal(result[1], expected[2])
        untouched = torch.ones_like(whole, dtype=torch.bool)
        untouched.as_strided(logits.shape, logits.stride(), logits.storage_offset()).fill_(False)
        assert torch.equal(whole[untouched], before[untouched]), "nothing beside the logits is written"


@pytest.mark.parametrize("name", OPERATORS)
@pytest.mark.parametrize("kind", ["classes", "entries", "dense"])
@pytest.mark.parametrize("shape", [(0, 5), (0, 5, 3), (2, 5, 0)])
def test_no_rows(name: str, kind: str, shape: tuple[int, ...]) -> None:
    for mean in (True, False):
        result = OPERATORS[name](**arguments(name, torch.randn(shape), kind, mean=mean))
        outputs = [result] if isinstance(result, Tensor) else list(result or ())
        if "fused" in name:
            loss = outputs.pop(0)
            assert loss.isnan() if mean else loss == 0, "a mean over nothing, a sum over nothing"
        assert all(out.numel() == 0 for out in outputs)


def test_no_classes() -> None:
    call = arguments("row_stats", torch.randn(3, 0), "dense")
    assert ops.row_stats(**call).shape == (ops.STATS, 3)
    call = arguments("row_stats", torch.randn(3, 1)) | {"logits": torch.randn(3, 0)}
    with pytest.raises(IndexError, match="softce: target out of range"):
        ops.row_stats(**call)


@pytest.mark.parametrize("name", OPERATORS)
@pytest.mark.parametrize("layout", ["rows", "planes"])
@pytest.mark.parametrize("bad", [C, -1, 2**40, -(2**63)])
def test_class_out_of_range(name: str, layout: str, bad: int) -> None:
    logits = LAYOUTS[layout](torch.float32)
    before = logits.clone()
    call = arguments(name, logits)
    call["index"][4] = bad
    message = rf"^softce: target out of range: value {bad} in row 4, expected 0 <= target < {C} .*ignore_index \(-100\)"
    with pytest.raises(IndexError, match=message):
        OPERATORS[name](**call)
    assert torch.equal(logits, before)


def without(*names: str) -> Callable[[Arguments], Arguments]:
    return lambda call: dict.fromkeys(names)


# What is wrong, the operators that have the argument, the arguments to replace, and the message.
BAD: dict[str, tuple[str, Callable[[Arguments], Arguments], str]] = {
    "logits 1-D": (
        "row_stats",
        lambda a: {"logits": torch.randn(C)},
        r"logits must be \(R, C\) or \(B, C, S\), got \(7,\)",
    ),
    "logits strided": (
        "row_stats",
        lambda a: {"logits": torch.randn(C, R).t()},
        "logits of shape .* must have stride 1 over the classes",
    ),
    "planes strided": (
        "row_stats",
        lambda a: {"logits": torch.randn(S, C, B).permute(2, 1, 0)},
        "must have stride 1 in the last dimension",
    ),
    "logits integer": (
        "row_stats",
        lambda a: {"logits": torch.ones(R, C, dtype=torch.int64)},
        "logits must be float32, .* got int64",
    ),
    "weight sparse": ("row_stats", lambda a: {"weight": torch.ones(C).to_sparse()}, "SparseCPU"),
    "no target": ("row_stats", without("index"), "exactly one of index .* and dense must be given, got neither"),
    "two targets": (
        "row_stats",
        lambda a: {"dense": a["logits"]},
        "exactly one of index .* and dense must be given, got both",
    ),
    "index dtype": ("row_stats", lambda a: {"index": a["index"].int()}, "index must be int64, got int32"),
    "index shape": ("row_stats", lambda a: {"index": a["index"][:-1]}, r"index must have shape \(6, 1\), got \(5, 1\)"),
    "index without columns": (
        "row_stats",
        lambda a: {"index": a["index"][:, :0]},
        "index must have at least one column",
    ),
    "index strided": (
        "row_stats",
        lambda a: {"index": torch.zeros(R, 4, dtype=torch.int64)[:, :2]},
        "index must be contiguous",
    ),
    "value shape": (
        "row_stats",
        lambda a: {"value": torch.ones(R, 2)},
        r"value must have shape \(6, 1\), got \(6, 2\)",
    ),
    "value dtype": ("row_stats", lambda a: {"value": torch.ones(R, 1).double()}, "value must be float32, got float64"),
    "rest shape": ("row_stats", lambda a: {"rest": torch.ones(R, 1)}, r"rest must have shape \(6,\), got \(6, 1\)"),
    "value with dense": (
        "row_stats",
        lambda a: {"index": None, "dense": a["logits"], "value": torch.ones(R, 1)},
        "value goes with index",
    ),
    "dense shape": (
        "row_stats",
        lambda a: {"index": None, "dense": torch.rand(R, C + 1)},
        r"dense must have the logits' shape \(6, 7\), got \(6, 8\)",
    ),
    "dense dtype": (
        "row_stats",
        lambda a: {"index": None, "dense": torch.rand(R, C).half()},
        "dense must be float32, got float16",
    ),
    "dense strided": (
        "row_stats",
        lambda a: {"index": None, "dense": torch.rand(C, R).t()},
        "dense of shape .* must have stride 1",
    ),
    "weight shape": (
        "row_stats",
        lambda a: {"weight": torch.rand(C - 1)},
        r"weight must have shape \(7,\), got \(6,\)",
    ),
    "weight dtype": (
        "row_stats",
        lambda a: {"weight": torch.rand(C).bfloat16()},
        "weight must be float32, got bfloat16",
    ),
    "spec short": ("row_stats", lambda a: {"spec": [1.0, 0.0]}, "spec must have 12 values, got 2"),
    "spec phi": (
        "row_stats",
        lambda a: {"spec": list(ops.Spec(phi=5))},
        r"spec\.phi must be a whole number from 0 to 4, got 5",
    ),
    "spec nan": (
        "row_stats",
        lambda a: {"spec": list(ops.Spec(temperature=float("nan")))},
        r"spec\.temperature must be positive, got nan",
    ),
    "row_weight shape": (
        "row_fused",
        lambda a: {"row_weight": torch.rand(R, 1)},
        r"row_weight must have shape \(6,\), got \(6, 1\)",
    ),
    "row_weight dtype": (
        "row_fused",
        lambda a: {"row_weight": torch.rand(R).double()},
        "row_weight must be float32, got float64",
    ),
    "lse shape": ("row_grad", lambda a: {"lse": torch.rand(R - 1)}, r"lse must have shape \(6,\), got \(5,\)"),
    "lse dtype": ("row_grad", lambda a: {"lse": torch.rand(R).double()}, "lse must be float32, got float64"),
    "coef shape": ("row_grad", lambda a: {"coef": torch.rand(4, R)}, r"coef must have shape \(3, 6\), got \(4, 6\)"),
    "coef 1-D": ("row_grad", lambda a: {"coef": torch.rand(R)}, r"coef must have shape \(3, 6\), got \(6,\)"),
}


@pytest.mark.parametrize("what", BAD)
def test_bad_arguments(what: str) -> None:
    name, change, message = BAD[what]
    call = arguments(name, LAYOUTS["rows"](torch.float32))
    with pytest.raises((RuntimeError, NotImplementedError), match=message):
        OPERATORS[name](**call | change(call))
    if name != "row_stats":
        logits = call["logits"].clone()
        with pytest.raises(RuntimeError, match=message):
            OPERATORS[f"{name}_"](**call | change(call))
        assert torch.equal(call["logits"], logits)


OVERLAPPING = {
    "expanded rows": torch.randn(1, C).expand(R, C),
    "expanded classes": torch.randn(B, 1, S).expand(B, C, S),
    "windows": torch.randn(R + C).as_strided((R, C), (1, 1)),
}


@pytest.mark.parametrize("what", OVERLAPPING)
def test_in_place_refuses_logits_that_overlap_themselves(what: str) -> None:
    for name in ("row_fused", "row_grad"):
        call = arguments(name, OVERLAPPING[what])
        OPERATORS[name](**call)
        with pytest.raises(RuntimeError, match=r"in place, logits of shape .* must not overlap themselves"):
            OPERATORS[f"{name}_"](**call)


def test_in_place_refuses_other_arguments_in_the_logits_memory() -> None:
    memory = torch.rand(R * C + R)
    logits = memory[: R * C].view(R, C)
    inside, beside = memory[R * C - R : R * C], memory[R * C :]
    for name, argument in (("row_fused_", "row_weight"), ("row_fused_", "rest"), ("row_grad_", "lse")):
        call = arguments(name, logits)
        with pytest.raises(RuntimeError, match=f"in place, {argument} must not share memory with the logits"):
            OPERATORS[name](**call | {argument: inside})
        OPERATORS[name](**call | {argument: beside})
    call = arguments("row_fused_", logits, "dense") | {"dense": logits}
    with pytest.raises(RuntimeError, match="in place, dense must not share memory with the logits"):
        ops.row_fused_(**call)


def test_index_of_one_dimension_is_one_column() -> None:
    call = arguments("row_fused", LAYOUTS["rows"](torch.float32))
    flat = call | {"index": call["index"].flatten()}
    assert all(torch.equal(a, b) for a, b in zip(ops.row_fused(**call), ops.row_fused(**flat), strict=True))


# ---- helpers of loops in Python ----


@pytest.mark.parametrize("shape", [(1, 1), (16, 64), (17, 65), (3, 200), (513, 1000), (0, 4), (4, 0)], ids=str)
def test_transpose(shape: tuple[int, int]) -> None:
    rows, columns = shape
    x = torch.randn(rows, columns + 7)[:, 3 : 3 + columns]
    out = torch.full((columns + 2, rows), 7.0)
    for count in (1, 2):
        with threads(count):
            ops.transpose_(x, out[1:-1])
        assert torch.equal(out[1:-1], x.t())
        assert (out[0] == 7).all() and (out[-1] == 7).all()
        out[1:-1] = 0
    torch.library.opcheck(ops.transpose_, (x, torch.empty(columns, rows)))


def test_transpose_refuses() -> None:
    x = torch.randn(4, 6)
    for args, message in (
        ((x.double(), x.t().contiguous()), "x must be float32, got float64"),
        ((x[0], x), "x must be a matrix"),
        ((x.t(), x), "stride 1 in the last dimension"),
        ((x, x), r"out must have shape \(6, 4\), got \(4, 6\)"),
        ((x, torch.empty(4, 6).t()), "out must be contiguous"),
        ((x, x.view(6, 4)), "out must not share memory with x"),
    ):
        with pytest.raises(RuntimeError, match=message):
            ops.transpose_(*args)


def test_new_empty() -> None:
    like = torch.empty(0, dtype=torch.bfloat16)
    for shape in ((), (0,), (3, 4), (2, 3, 5), (1 << 20, 3)):
        made = ops.new_empty(like, shape, torch.float32)
        assert made.shape == shape and made.dtype == torch.float32 and made.is_contiguous()
        made.fill_(1.0)
    assert softce.pool_stats()["live_bytes"] >= 12 << 20
    for size, message in (
        ((1, 1, 1, 1), "at most 3 dimensions, got 4"),
        ((-1,), "neither negative nor too large"),
        ((1 << 21, (1 << 43) + 1), "neither negative nor too large"),
    ):
        with pytest.raises(RuntimeError, match=message):
            torch.ops.softce.new_empty(like, size)
    assert ops.new_empty(like.to("meta"), (3,), torch.float64).device.type == "meta"

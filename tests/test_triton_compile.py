# SPDX-License-Identifier: BSD-3-Clause
"""Every configuration of the Triton row kernel, compiled ahead of time as the launcher launches it. No GPU needed.

A driver that only names its target stands in for the GPU's, and tensors on the ``meta`` device for real ones; so what
is compiled has the specialisations (alignment, divisibility by 16) of a launch of that shape. For NVIDIA the machine
code is read back: no spilled registers, and 128-bit loads and stores of the rows.

The ordinary run compiles every entry of the table for each architecture in one form; ``SOFTCE_COMPILE_ALL=1`` compiles
every form, type and operator, which takes long.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import re
import subprocess
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from softce.ops import DENSE_LOGITS, KernelTarget, Spec

if importlib.util.find_spec("triton") is None:
    pytest.skip("triton is not installed", allow_module_level=True)
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("TRITON_INTERPRET=1: the kernels are not compiled", allow_module_level=True)
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")

import triton
from tqdm import tqdm
from triton.backends.compiler import GPUTarget

from softce.backends import triton as backend
from softce.backends import triton_configs as configs

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
BF16, F16, F32, F64 = torch.bfloat16, torch.float16, torch.float32, torch.float64


class Driver:
    """What Triton asks of a driver when it compiles."""

    def __init__(self, target: Any) -> None:
        self.target = target

    def get_current_target(self) -> Any:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int | None = None) -> int:
        return 0


class Compiled(NamedTuple):
    """A kernel as compiled, and what its launch asked for."""

    kernel: Any
    options: dict[str, Any]
    programs: int

    def spills(self) -> int:
        """What goes to memory: bytes of local memory (NVIDIA), spilled vector registers and scratch bytes (AMD).

        NVIDIA: a kernel that has no local memory cannot access it; that is told without the disassembler, which takes
        as long as the compiler. AMD: scalar registers, which hold masks here, spill to lanes of vector registers.
        """
        if "cubin" not in self.kernel.asm:
            text = self.kernel.asm["amdgcn"]
            numbers = re.findall(r"\.(?:vgpr_spill_count|private_segment_fixed_size):\s+(\d+)", text)
            assert len(numbers) == 2, numbers
            return sum(map(int, numbers))
        return self._resource("STACK") + self._resource("LOCAL")

    def registers(self) -> int:
        if "cubin" not in self.kernel.asm:
            return int(re.search(r"\.vgpr_count:\s+(\d+)", self.kernel.asm["amdgcn"])[1])  # type: ignore[index]
        return self._resource("REG")

    def _resource(self, name: str) -> int:
        return int(re.search(rf"{name}:(\d+)", self._tool("cuobjdump", "-res-usage"))[1])  # type: ignore[index]

    def instructions(self) -> Counter[str]:
        """Global memory instructions of the machine code: ``LDG``, ``LDG128``, ``STG``, ``STG128``."""
        found: Counter[str] = Counter()
        for name, rest in re.findall(r"\b(LDG|STG)([.\w]*)", self._tool("nvdisasm", "-c")):
            found[name + ("128" if ".128" in rest else "")] += 1
        return found

    def _tool(self, name: str, option: str) -> str:
        path = Path(os.environ["PYTEST_SOFTCE_TMP"]) / f"{self.kernel.hash}.cubin"
        path.write_bytes(self.kernel.asm["cubin"])
        return subprocess.run([TOOLS / name, option, path], capture_output=True, text=True, check=True).stdout


@pytest.fixture(autouse=True)
def _workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("PYTEST_SOFTCE_TMP", str(tmp_path))
    yield
    with contextlib.suppress(RuntimeError):  # there is no driver to go back to
        triton.runtime.driver.reset_active()


def compile_call(monkeypatch: pytest.MonkeyPatch, target: str, operator: str, *arguments: Any) -> dict[str, Compiled]:
    """The kernels that a call of a backend function launches, compiled for ``target``."""
    found: dict[str, Compiled] = {}

    def launch(kernel: Any, programs: int, *arguments: Any, **options: Any) -> None:
        kernel.device_caches.clear()  # they are kept by device number, not by target
        compiled = kernel.warmup(*arguments, enable_fp_fusion=True, grid=(programs,), **options)
        found[kernel.fn.__name__] = Compiled(compiled, options, programs)

    triton.runtime.driver.set_active(Driver(TARGETS[target]))
    monkeypatch.setattr(backend, "_launch", launch)
    monkeypatch.setattr(backend, "multiprocessors", lambda device: 132)
    getattr(backend, operator)(*arguments)
    return found


def meta(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


# How each form of the table is asked for: the fullest call that takes it.
def target_of(form: str, shape: tuple[int, ...], dtype: torch.dtype) -> tuple[KernelTarget, Spec]:
    rows, classes = shape[0] * (shape[2] if len(shape) == 3 else 1), shape[1]
    acc = F64 if dtype == F64 else F32
    index = meta(rows, 1, dtype=torch.int64)
    weight = meta(classes, dtype=acc)
    smoothed = {"mix_a": 0.9, "mix_b": 0.1}
    return {
        "sparse": (KernelTarget(index), Spec()),
        "topk": (KernelTarget(meta(rows, 32, dtype=torch.int64), meta(rows, 32, dtype=acc)), Spec()),
        "uniform": (KernelTarget(index), Spec(**smoothed)),
        "rest": (
            KernelTarget(meta(rows, 32, dtype=torch.int64), meta(rows, 32, dtype=acc), meta(rows, dtype=acc)),
            Spec(**smoothed),
        ),
        "weighted": (KernelTarget(index, weight=weight), Spec(**smoothed)),
        "dense": (KernelTarget(dense=meta(*shape, dtype=dtype)), Spec(**smoothed)),
        "weighted_dense": (KernelTarget(dense=meta(*shape, dtype=acc), weight=weight), Spec(**smoothed)),
        "teacher": (KernelTarget(dense=meta(*shape, dtype=dtype)), Spec(dense_kind=DENSE_LOGITS)),
        "opposed_teacher": (
            KernelTarget(dense=meta(*shape, dtype=dtype), weight=weight),
            Spec(dense_kind=DENSE_LOGITS, mix_a=-0.1, mix_b=0.1),
        ),
        "weighted_teacher": (
            KernelTarget(dense=meta(*shape, dtype=dtype), weight=weight),
            Spec(dense_kind=DENSE_LOGITS, **smoothed),
        ),
        "softcap": (KernelTarget(index, weight=weight), Spec(softcap=30.0, z_loss=1e-4, **smoothed)),
        "softcap_dense": (
            KernelTarget(dense=meta(*shape, dtype=acc), weight=weight),
            Spec(softcap=30.0, **smoothed),
        ),
        "softcap_teacher": (
            KernelTarget(dense=meta(*shape, dtype=dtype), weight=weight),
            Spec(softcap=30.0, dense_kind=DENSE_LOGITS, phi=1.0, phi_p0=2.0, **smoothed),
        ),
    }[form]


FORMS = {
    configs.SPARSE: ("sparse", "topk"),
    configs.UNIFORM: ("uniform", "weighted", "rest"),
    configs.DENSE: ("dense", "weighted_dense"),
    configs.HEAVY: ("teacher", "weighted_teacher", "opposed_teacher", "softcap", "softcap_dense", "softcap_teacher"),
    configs.EXTRAS: ("sparse", "weighted", "weighted_dense", "softcap_teacher"),
}


class Variant(NamedTuple):
    """One compilation: an operator on logits of a shape, with a form of target."""

    operator: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    form: str
    extras: bool = False

    @property
    def name(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        return f"{self.operator}-{'x'.join(map(str, self.shape))}-{dtype}-{self.form}{'-extras' if self.extras else ''}"

    def compile(self, monkeypatch: pytest.MonkeyPatch, target: str) -> Compiled:
        given, spec = target_of(self.form, self.shape, self.dtype)
        logits = meta(*self.shape, dtype=self.dtype)
        acc = F64 if self.dtype == F64 else F32
        rows = self.shape[0] * (self.shape[2] if len(self.shape) == 3 else 1)
        if self.operator == "row_grad":
            lse, coef = meta(rows, dtype=acc), meta(3 if self.extras else 2, rows, dtype=acc)
            arguments: tuple[Any, ...] = (logits, lse, coef, *given, -100, list(spec))
        elif self.operator == "row_stats":
            arguments = (logits, *given, -100, list(spec), self.extras)
        else:
            arguments = (logits, *given, None, -100, list(spec), True, self.extras)
        return compile_call(monkeypatch, target, self.operator, *arguments)["row_kernel"]


def table_shapes(form: str) -> list[tuple[int, ...]]:
    """A shape for each entry of the table, and for the tiles of few classes and of planes."""
    classes = [256000 if most is None else most for most, _ in configs.TABLE[form]]
    return [(8192, 16), *((8192, c) for c in classes), (8, 16, 65536), (8, 1024, 4096)]


def variants(operators: tuple[str, ...], dtypes: tuple[torch.dtype, ...]) -> list[Variant]:
    return [
        Variant(operator, shape, dtype, form, kind == configs.EXTRAS)
        for kind, forms in FORMS.items()
        for form in forms
        for shape in table_shapes(kind)
        for dtype in dtypes
        for operator in operators
    ]


EVERY = [
    *variants(("row_fused",), (BF16, F32, F64)),
    *variants(("row_stats", "row_grad"), (BF16, F32)),
]

# Every entry of the table once, in the type that takes most of it.
ENTRIES = [
    Variant("row_fused", shape, F32, "weighted" if kind == configs.EXTRAS else forms[0], kind == configs.EXTRAS)
    for kind, forms in FORMS.items()
    for shape in table_shapes(kind)
]
OTHERS = [
    Variant("row_fused", (8192, 128256), BF16, "topk"),
    Variant("row_fused", (8192, 16384), BF16, "weighted"),
    *(Variant("row_fused", (8192, classes), BF16, "rest") for classes in (16, 1024, 4096, 16384, 128256)),
    Variant("row_fused", (8, 1024, 4096), F32, "rest"),
    Variant("row_fused", (8192, 4096), F32, "rest", True),
    Variant("row_fused", (8192, 4096), F32, "opposed_teacher"),
    Variant("row_fused", (8192, 128256), BF16, "weighted_dense"),
    Variant("row_fused", (8192, 128256), F32, "softcap_teacher"),
    Variant("row_fused", (8192, 32768), F64, "softcap_dense"),
    Variant("row_stats", (8192, 128256), BF16, "sparse"),
    Variant("row_grad", (8192, 128256), BF16, "weighted", True),
    Variant("row_grad", (8192, 4096), F32, "softcap_teacher"),
]


def check(variant: Variant, target: str, monkeypatch: pytest.MonkeyPatch) -> Compiled:
    compiled = variant.compile(monkeypatch, target)
    usage = f"{compiled.registers()} registers, {compiled.spills()} spilled, {compiled.options}"
    print(f"{target} {variant.name}: {usage}")
    assert compiled.spills() == 0, f"{variant.name} on {target}: {usage}"
    return compiled


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("variant", ENTRIES, ids=lambda v: v.name)
def test_no_entry_of_the_table_spills(variant: Variant, target: str, monkeypatch: pytest.MonkeyPatch) -> None:
    check(variant, target, monkeypatch)


@pytest.mark.parametrize("variant", OTHERS, ids=lambda v: v.name)
def test_other_forms_and_operators_do_not_spill(variant: Variant, monkeypatch: pytest.MonkeyPatch) -> None:
    check(variant, "sm_90", monkeypatch)


# Sizes of 1 are constants of the compilation, and so is an ignore_index of 1.
ONES = [
    Variant("row_fused", (1, 1), F32, "sparse"),
    Variant("row_grad", (4, 1), F64, "weighted", True),
    Variant("row_stats", (1, 3, 1), F32, "topk", True),
    Variant("row_fused", (1, 70000), F16, "softcap_teacher"),
]


@pytest.mark.parametrize("variant", ONES, ids=lambda v: v.name)
def test_sizes_of_one(variant: Variant, monkeypatch: pytest.MonkeyPatch) -> None:
    check(variant, "sm_90", monkeypatch)


@pytest.mark.parametrize("phi", [1.0, 2.0, 3.0, 4.0])
def test_row_losses(phi: float, monkeypatch: pytest.MonkeyPatch) -> None:
    logits, index = meta(64, 1000, dtype=F32), meta(64, 1, dtype=torch.int64)
    spec = list(Spec(phi=phi, phi_p0=0.5))
    found = compile_call(
        monkeypatch, "sm_90", "row_fused", logits, index, None, None, None, None, None, 1, spec, True, False
    )
    assert set(found) == {"count_kernel", "row_kernel", "loss_kernel"}
    assert all(compiled.spills() == 0 for compiled in found.values())


@pytest.mark.skipif(not os.environ.get("SOFTCE_COMPILE_ALL"), reason="SOFTCE_COMPILE_ALL=1 compiles every variant")
@pytest.mark.parametrize("target", TARGETS)
def test_no_variant_spills(target: str, monkeypatch: pytest.MonkeyPatch) -> None:
    spilled = {}
    for variant in tqdm(EVERY, desc=target):
        with monkeypatch.context() as patch:
            compiled = variant.compile(patch, target)
        if compiled.spills():
            spilled[variant.name] = f"{compiled.spills()} {compiled.options}"
    assert not spilled, "\n".join(f"{name}: {what}" for name, what in spilled.items())


HOT = [
    Variant("row_fused", (8192, classes), dtype, form)
    for form in ("sparse", "dense")
    for classes, dtype in ((4096, BF16), (32768, BF16), (128256, BF16), (128256, F32))
]


@pytest.mark.parametrize("variant", HOT, ids=lambda v: v.name)
def test_rows_move_in_128_bits(variant: Variant, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled = check(variant, "sm_90", monkeypatch)
    found = compiled.instructions()
    config, _ = compiled.options, compiled.programs
    per_thread = config["BLOCK"] // (32 * config["num_warps"]) * variant.dtype.itemsize // 16
    # Once to hold the row, or once each for the reference, its sums and its gradient.
    reads = 1 if config["BLOCK"] >= variant.shape[1] else 3
    assert found["LDG128"] >= reads * per_thread, found
    assert found["STG128"] == per_thread, found


def test_the_table_is_chosen_by_form() -> None:
    for form in configs.FORMS:
        for classes in (1, 2, 10, 511, 513, 1000, 4097, 50257, 1 << 20):
            for inner in (0, 1, 77, 65536):
                for entries in (0, 1, 2, 64, 3000):
                    config = configs.choose(form, classes, inner, entries, wide=False)
                    assert all(n & (n - 1) == 0 and n > 0 for n in (config.rows, config.block, config.warps)), config
                    assert config.rows == 1 or config.rows * configs.power_of_two(entries) <= 4096

# SPDX-License-Identifier: BSD-3-Clause
"""The pool that large CPU outputs come from: reuse, bounds, idle memory given back, threads, forks."""

from __future__ import annotations

import gc
import math
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator

import pytest
import torch

import softce
from softce import _library, ops

pytestmark = pytest.mark.usefixtures("cpu_kernels")

MIB = 1 << 20
HUGE_PAGE = 2 * MIB


@pytest.fixture(autouse=True)
def fresh_pool(cpu_kernels: None) -> Iterator[None]:
    gc.collect()
    before = softce.pool_stats()
    softce.empty_cache()
    yield
    gc.collect()
    _library.set_pool_limits(before["limit_bytes"], before["idle_ms"] / 1000)
    softce.empty_cache()


def output(mib: float, fill: float | None = None) -> torch.Tensor:
    """A gradient of so many MiB, the only large output of the call that makes it."""
    logits = torch.zeros(1, 1).expand(1, int(mib * MIB / 4))
    index = torch.zeros(1, 1, dtype=torch.int64)
    lse, coef = torch.zeros(1), torch.zeros(2, 1)
    grad: torch.Tensor = ops.row_grad(logits.contiguous(), lse, coef, index, *[None] * 4, -100, list(ops.Spec()))
    return grad if fill is None else grad.fill_(fill)


def run(script: str, **environment: str) -> subprocess.CompletedProcess[str]:
    source = f"import torch\ntorch.set_num_threads(1)\n{script}"
    path = os.pathsep.join([os.path.dirname(__file__), *sys.path])
    environment = {**os.environ, "PYTHONPATH": path, **environment}
    return subprocess.run([sys.executable, "-c", source], capture_output=True, text=True, env=environment, timeout=120)


@pytest.mark.parametrize(("mib", "block"), [(8, 8), (1, 2)])
def test_memory_is_reused_and_aligned(mib: int, block: int) -> None:
    before = softce.pool_stats()
    first = output(mib)
    address = first.data_ptr()
    assert address % HUGE_PAGE == 0
    assert softce.pool_stats()["live_bytes"] - before["live_bytes"] == block * MIB
    del first
    assert softce.pool_stats()["idle_bytes"] == block * MIB
    second = output(mib)
    after = softce.pool_stats()
    assert second.data_ptr() == address
    assert (after["mapped"] - before["mapped"], after["reused"] - before["reused"]) == (1, 1)
    assert after["idle_bytes"] == 0


def test_live_outputs_do_not_share_memory() -> None:
    outputs = [output(4 + i, fill=i) for i in range(4)]
    assert all(bool((x == i).all()) for i, x in enumerate(outputs))


def test_memory_outlives_views_and_serves_autograd() -> None:
    logits = torch.randn(64, 32768, requires_grad=True)
    softce.cross_entropy(logits, torch.arange(64)).backward()
    view = logits.grad[3:5]
    expected = view.clone()
    logits.grad = None
    other = output(8, fill=7.0)
    assert torch.equal(view, expected)
    assert bool((other == 7).all())


def test_small_outputs_do_not_use_it() -> None:
    before = softce.pool_stats()
    kept = output(0.9)
    assert softce.pool_stats() == before
    assert kept.numel() > 0


@pytest.mark.parametrize(("first", "second", "shared"), [(8, 6, True), (8, 14, True), (16, 6, False), (6, 16, False)])
def test_reuse_within_a_factor_of_two(first: int, second: int, shared: bool) -> None:
    output(first, fill=1.0)
    before = softce.pool_stats()
    grown = output(second, fill=2.0)
    after = softce.pool_stats()
    assert after["reused"] - before["reused"] == int(shared)
    assert grown.data_ptr() % HUGE_PAGE == 0
    assert bool((grown == 2).all())
    assert after["live_bytes"] - before["live_bytes"] == (max(first, second) if shared else second) * MIB


@pytest.mark.parametrize("limit", [0, 20 * MIB])
def test_idle_memory_is_bounded(limit: int) -> None:
    _library.set_pool_limits(max_idle_bytes=limit)
    outputs = [output(8) for _ in range(4)]
    addresses = [x.data_ptr() for x in outputs]
    while outputs:
        outputs.pop(0)
        assert softce.pool_stats()["idle_bytes"] <= limit
    assert softce.pool_stats()["idle_blocks"] == limit // (8 * MIB)
    if limit:  # the least recently used went first
        assert output(8).data_ptr() in addresses[2:]


def test_lowering_the_limit_gives_memory_back() -> None:
    output(8)
    _library.set_pool_limits(max_idle_bytes=4 * MIB)
    assert softce.pool_stats()["idle_bytes"] == 0


def test_empty_cache_gives_memory_back() -> None:
    def resident() -> int:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGESIZE")

    output(64, fill=1.0)
    before = resident()
    assert softce.empty_cache() == 64 * MIB
    assert before - resident() > 48 * MIB
    assert softce.pool_stats()["idle_bytes"] == 0
    assert softce.empty_cache() == 0


def test_long_idle_memory_is_given_back_without_a_call() -> None:
    _library.set_pool_limits(idle_seconds=0.2)
    output(8)
    assert softce.pool_stats()["idle_bytes"] == 8 * MIB
    deadline = time.monotonic() + 20
    while softce.pool_stats()["idle_bytes"] or softce.pool_stats()["timer_running"]:
        assert time.monotonic() < deadline, softce.pool_stats()
        time.sleep(0.02)


def test_lowering_the_idle_time_wakes_the_timer() -> None:
    output(8)
    assert softce.pool_stats()["timer_running"] == 1
    _library.set_pool_limits(idle_seconds=0.3)
    deadline = time.monotonic() + 8  # the default idle time is longer
    while softce.pool_stats()["idle_bytes"]:
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_many_threads() -> None:
    _library.set_pool_limits(max_idle_bytes=24 * MIB, idle_seconds=0.01)
    before = softce.pool_stats()["live_bytes"]
    wrong: list[str] = []

    def work(seed: int) -> None:
        for i in range(40):
            value = float(seed * 100 + i)
            mine = output(4 + (seed * 7 + i * 5) % 9, fill=value)
            if not bool((mine == value).all()):
                wrong.append(f"thread {seed}, turn {i}")
            if i % 10 == seed:
                softce.empty_cache()

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert softce.pool_stats()["live_bytes"] == before
    assert softce.pool_stats()["idle_bytes"] <= 24 * MIB


FORK = """
import os, signal, time
import softce
from softce import _library
from test_pool import MIB, output

_library.set_pool_limits(idle_seconds=0.05)
kept = output(8, fill=1.0)
for turn in range(20):  # forks at all moments of the timer's life
    output(8, fill=2.0)
    time.sleep(0.007 * turn)
    child = os.fork()
    if child == 0:
        signal.alarm(30)  # a deadlock ends the child
        assert softce.pool_stats()["idle_bytes"] == 0
        assert bool((kept == 1).all())
        mine = output(8, fill=3.0)
        del kept, mine
        assert softce.pool_stats()["idle_bytes"] == 16 * MIB
        while softce.pool_stats()["idle_bytes"]:
            time.sleep(0.01)
        output(12)
        os._exit(0)
    assert bool((kept == 1).all())
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0, turn
print("done", softce.pool_stats()["live_bytes"] // MIB)
"""


def test_fork() -> None:
    result = run(FORK)
    assert result.returncode == 0, result.stderr
    assert result.stdout.split() == ["done", "8"]


def test_process_ends_with_live_and_idle_memory() -> None:
    result = run("from test_pool import output\nkept = output(8)\noutput(16)\nprint('end')")
    assert (result.returncode, result.stdout.strip()) == (0, "end"), result.stderr


def test_environment_sets_the_bounds() -> None:
    script = "import softce\nstats = softce.pool_stats()\nprint(stats['limit_bytes'], stats['idle_ms'])"
    result = run(script, SOFTCE_POOL_LIMIT="48M", SOFTCE_POOL_IDLE_SECONDS="2.5")
    assert result.stdout.split() == [str(48 * MIB), "2500"], result.stderr
    result = run(script, SOFTCE_POOL_LIMIT="", SOFTCE_POOL_IDLE_SECONDS="")
    limit, idle = map(int, result.stdout.split())
    assert idle == 10_000
    assert 0 < limit <= os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGESIZE") // 4
    result = run(script, SOFTCE_POOL_LIMIT="lots")
    assert result.returncode != 0
    assert "SOFTCE_POOL_LIMIT must be a number of bytes such as 1000000, 512M or 2G, got 'lots'" in result.stderr


def test_endless_bounds() -> None:
    for bound in (2**80, math.inf):
        _library.set_pool_limits(bound, bound)
        assert softce.pool_stats()["limit_bytes"] >= 2**60 and softce.pool_stats()["idle_ms"] >= 2**50
    _library.set_pool_limits()
    assert softce.pool_stats()["limit_bytes"] >= 2**60


def test_negative_bounds_are_refused() -> None:
    with pytest.raises(TypeError, match="max_idle_bytes must be a number or None, not str"):
        _library.set_pool_limits("1G")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="idle_seconds must be a number or None, not bool"):
        _library.set_pool_limits(idle_seconds=True)
    with pytest.raises(ValueError, match="max_idle_bytes=-1"):
        _library.set_pool_limits(max_idle_bytes=-1)
    with pytest.raises(ValueError, match="idle_seconds=nan"):
        _library.set_pool_limits(idle_seconds=float("nan"))

# SPDX-License-Identifier: BSD-3-Clause
"""The timer of the benchmark suite, and its waiting for a calm core."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
if not (ROOT / "bench" / "__main__.py").exists():
    pytest.skip("the benchmarks are not beside these tests", allow_module_level=True)
sys.path.insert(0, str(ROOT))

from bench import calm, timer  # noqa: E402
from bench.timer import Entry, interleave, quartiles, ratio, ratio_of_least  # noqa: E402


def test_ratios_are_taken_round_by_round() -> None:
    # The machine slows down by ten in the last two rounds; the ratio of the contestants stays 2.
    base = [1.0, 1.0, 1.0, 10.0, 10.0]
    assert ratio([2 * value for value in base], base) == (2.0, 2.0, 2.0)
    assert ratio([4.0, 9.0], [2.0, 3.0, 5.0])[0] == 2.5  # only the rounds both took part in
    assert ratio_of_least([4.0, 9.0], [6.0, 3.0, 2.0]) == 2.0  # whenever each was at its best
    assert quartiles([3.0]) == (3.0, 3.0)
    assert quartiles([1.0, 2.0, 3.0, 4.0, 5.0]) == (2.0, 4.0)


class Clock:
    """Time that passes only where a test says so: a busy machine changes nothing."""

    def __init__(self) -> None:
        self.now = 0.0

    def perf_counter(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    found = Clock()
    monkeypatch.setattr(timer, "time", found)
    return found


def test_timer_sees_which_contestant_is_slower(clock: Clock) -> None:
    entries = [Entry("slow", lambda: clock.sleep(0.004)), Entry("fast", lambda: clock.sleep(0.001))]
    found = interleave(entries, seconds=0.123, min_rounds=5)
    assert ratio(found["slow"].seconds, found["fast"].seconds)[0] == pytest.approx(4.0)
    assert (found["slow"].calls, found["fast"].calls) == (1, 2)  # a sample of a short call holds several
    assert len(found["slow"].seconds) == len(found["fast"].seconds) == 20  # 123 ms of 4 + 2 ms a round


def test_timer_fills_the_samples_of_a_short_call_whose_first_calls_were_slow(clock: Clock) -> None:
    slow = [0.5, 0.019, 0.01, 0.01]  # compiling, then caches and predictors that another contestant left cold
    entry = Entry("x", lambda: clock.sleep(slow.pop(0) if slow else 0.0005))
    assert interleave([entry], seconds=0.1, min_rounds=2)["x"].calls == 4


def test_timer_leaves_before_and_after_untimed_and_calls_them_once_a_sample(clock: Clock) -> None:
    log: list[str] = []

    def step(name: str, seconds: float) -> None:
        log.append(name)
        clock.sleep(seconds)

    entry = Entry("x", lambda: step("run", 0.03), lambda: step("before", 0.5), lambda: step("after", 0.5))
    samples = interleave([entry], seconds=0.01, min_rounds=2, max_rounds=2)["x"]
    assert samples.seconds == pytest.approx([0.03, 0.03])
    assert "".join(word[0] for word in log) == "bra" * (len(log) // 3)


def test_timer_shuffles_the_order_of_every_round(clock: Clock) -> None:
    log: list[str] = []

    def run(name: str) -> None:
        log.append(name)
        clock.sleep(0.03)

    names = ["a", "b", "c"]
    interleave([Entry(name, lambda name=name: run(name)) for name in names], seconds=2.0, min_rounds=20)
    rounds = [tuple(log[i : i + 3]) for i in range(6, len(log), 3)]
    assert all(sorted(order) == names for order in rounds)
    assert len(set(rounds)) == 6


def test_timer_reports_a_failing_contestant_and_times_the_others(clock: Clock) -> None:
    calls = 0

    def fails_late() -> None:
        nonlocal calls
        calls += 1
        clock.sleep(0.002)
        if calls > 17:  # past the warm-up
            raise RuntimeError("after a while")

    def fails() -> None:
        raise ValueError("at once")

    entries = [Entry("a", fails), Entry("b", fails_late), Entry("c", lambda: clock.sleep(0.002))]
    found = interleave(entries, seconds=0.02, min_rounds=8, max_rounds=8)
    assert found["a"].error == "ValueError: at once"
    assert found["b"].error == "RuntimeError: after a while"
    assert found["c"].error is None and len(found["c"].seconds) == 8
    assert found["a"].as_json() == {"error": "ValueError: at once"}


def test_timer_gives_a_very_slow_contestant_fewer_rounds(clock: Clock) -> None:
    seconds = {"fast": 0.002, "slow": 0.3, "slower": 10.0, "slowest": 50.0}
    entries = [Entry(name, lambda value=value: clock.sleep(value)) for name, value in seconds.items()]
    found = interleave(entries, seconds=0.05, min_rounds=10)
    assert {name: len(found[name].seconds) for name in seconds} == {"fast": 10, "slow": 3, "slower": 1, "slowest": 1}
    assert found["slowest"].note == "first call only" and found["slower"].note == ""
    assert clock.now < 85  # the slowest was called once


def test_timer_refuses_two_entries_of_one_name() -> None:
    with pytest.raises(ValueError, match="names must differ"):
        interleave([Entry("x", list), Entry("x", list)], seconds=0.01)


@pytest.mark.parametrize(
    ("patience", "times", "looks"),
    [(10.0, [2.0, 1.2, 1.05], 3), (10.0, [0.5, 0.5], 1), (0.01, [2.0] * 9, 1), (0.0, [], 0)],
)
def test_samples_wait_for_a_calm_core(
    patience: float, times: list[float], looks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As long as the loop of arithmetic takes more than 1.1 of its least time, and patience lasts."""
    left = iter(times)
    looked = []
    monkeypatch.setattr(calm.Spin, "least", lambda self: looked.append(0) or next(left))
    monkeypatch.setenv(calm.PATIENCE, str(patience))
    monkeypatch.setenv(calm.LEAST, "1.0")
    waited = calm.Calm().wait()
    assert len(looked) == looks
    assert (waited > 0.0) == (looks > 1 or patience == 0.01)


def test_waiting_goes_into_the_results(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(calm.PATIENCE, "0.05")
    monkeypatch.setenv(calm.LEAST, "1e-9")  # never calm: all of the patience is spent
    found = interleave([Entry("x", list)], seconds=0.01, min_rounds=2, max_rounds=2)["x"].as_json()
    assert 0.05 <= found["waited_s"] < 5.0

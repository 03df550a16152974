# SPDX-License-Identifier: BSD-3-Clause
"""The language-model demo: a tiny run from end to end, and the comparison that must be able to fail."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import softce
import softce.demo

pytest.importorskip("tokenizers")
pytest.importorskip("tqdm")
pytest.importorskip("matplotlib")

from softce.demo import contestants as losses
from softce.demo import corpus, language_model
from softce.demo.contestants import Contestant
from softce.demo.corpus import Corpus
from softce.demo.language_model import Agreement, compare, summary
from softce.demo.rss import PeakMeter
from softce.demo.train import Config, Run, train

VOCABULARY = 400
CONFIG = Config(steps=12, seconds=0.0, batch=2, length=16, width=16, layers=1, heads=2, warmup=2, threads=1)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small corpus: a few modules of the standard library."""
    folder = tmp_path_factory.mktemp("text")
    for path in corpus.sources()[:12]:
        (folder / path.name).write_bytes(path.read_bytes())
    return folder


@pytest.fixture(scope="module")
def small(text: Path, tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    return corpus.prepare(tmp_path_factory.mktemp("corpus"), VOCABULARY, text, quiet=True)


@pytest.fixture(scope="module")
def torch_run(small: Corpus) -> Iterator[Run]:
    before = torch.get_num_threads()
    yield train(losses.contestants()["torch"], small, CONFIG, quiet=True)
    torch.set_num_threads(before)


# ---- the corpus ----


def test_the_standard_library_is_a_corpus() -> None:
    files = corpus.sources()
    assert len(files) > 100 and all(path.suffix == ".py" for path in files)
    assert not any("site-packages" in path.parts or "test" in path.parts for path in files)
    assert files == sorted(files)


def test_tokens_decode_to_the_text(small: Corpus, text: Path) -> None:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(Path(small.folder) / "tokenizer.json"))
    tokens = small.load()
    assert tokens.dtype == torch.int64 and tokens.numel() == small.tokens
    assert int(tokens.min()) >= 0 and int(tokens.max()) < small.vocabulary == VOCABULARY == tokenizer.get_vocab_size()
    end = tokenizer.token_to_id(corpus.END)
    assert int((tokens == end).sum()) == small.files == len(list(text.iterdir()))
    first = corpus.sources(text)[0].read_text(encoding="utf-8", errors="replace")
    assert tokenizer.decode(tokens[: int((tokens == end).nonzero()[0])].tolist()) == first


def test_the_corpus_is_kept_until_the_text_changes(small: Corpus, text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def not_again(*_: object) -> Tensor:
        raise AssertionError("tokenized again")

    monkeypatch.setattr(corpus, "_tokenize", not_again)
    assert corpus.prepare(Path(small.folder), VOCABULARY, text, quiet=True) == small
    with pytest.raises(AssertionError, match="tokenized again"):
        corpus.prepare(Path(small.folder), VOCABULARY + 1, text, quiet=True)


def test_no_text_is_an_error_that_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="--corpus"):
        corpus.sources(tmp_path)


# ---- training and comparison ----


def test_training_measures_every_step(torch_run: Run) -> None:
    assert len(torch_run.losses) == len(torch_run.gradient_norms) == len(torch_run.step_seconds) == CONFIG.steps
    assert torch_run.losses[-1] < torch_run.losses[0]
    for alone, head, step in zip(torch_run.loss_seconds, torch_run.head_seconds, torch_run.step_seconds, strict=True):
        assert 0 < alone < head < step
    assert torch_run.kernels == "torch" and 0 < torch_run.held_out_loss < 10


def test_curves_of_softce_agree(small: Corpus, torch_run: Run, cpu_kernels: None) -> None:
    for name in losses.contestants():
        if name == "torch":
            continue
        run = train(losses.contestants()[name], small, CONFIG, quiet=True)
        assert compare(torch_run, run).failures == [], name
        assert run.kernels.startswith("C++"), run.kernels
        assert len(run.loss_seconds) == (0 if losses.contestants()[name].fused else CONFIG.steps)


@pytest.mark.parametrize(
    "wrong",
    [
        lambda x, t: F.cross_entropy(x, t, label_smoothing=1e-3),
        lambda x, t: F.cross_entropy(x, t) + 0.0 * x.sum() + 1e-3,
        lambda x, t: _Scaled.apply(F.cross_entropy(x, t)),
        lambda x, t: F.cross_entropy(x.bfloat16(), t),
    ],
    ids=["smoothed", "offset", "scaled gradient", "bfloat16"],
)
def test_a_slightly_wrong_loss_does_not_agree(small: Corpus, torch_run: Run, wrong: object) -> None:
    run = train(Contestant("wrong", "wrong", wrong), small, CONFIG, quiet=True)  # type: ignore[arg-type]
    assert compare(torch_run, run).failures


class _Scaled(torch.autograd.Function):
    """The right loss with a gradient that is 0.1% too large."""

    @staticmethod
    def forward(ctx: object, loss: Tensor) -> Tensor:  # type: ignore[override]
        return loss.clone()

    @staticmethod
    def backward(ctx: object, grad: Tensor) -> Tensor:  # type: ignore[override]
        return grad * 1.001


def test_fused_contestants_take_hidden_states_and_head(small: Corpus, torch_run: Run) -> None:
    fused = Contestant("fused", "fused", lambda hidden, head, t: F.cross_entropy(F.linear(hidden, head), t), fused=True)
    run = train(fused, small, CONFIG, quiet=True)
    assert compare(torch_run, run).failures == []
    assert run.loss_seconds == [] and len(run.head_seconds) == CONFIG.steps


def test_the_fused_linear_loss_joins_when_it_exists(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(softce, "linear_cross_entropy", lambda *_: None, raising=False)
    assert losses.default_names() == ["torch", "softce", "softce-linear"]
    monkeypatch.delattr(softce, "linear_cross_entropy")
    assert losses.default_names() == ["torch", "softce"]


def test_comparison_sees_nan_and_drift(torch_run: Run) -> None:
    assert compare(torch_run, torch_run) == Agreement(0.0, 0.0, 0.0, 0.0)
    for step, value in ((5, float("nan")), (CONFIG.steps - 1, torch_run.losses[-1] + 2 * language_model.DRIFT)):
        changed = replace(torch_run, losses=[*torch_run.losses[:step], value, *torch_run.losses[step + 1 :]])
        assert "drift" in compare(torch_run, changed).failures[0]
    with pytest.raises(ValueError, match="12 and 11 steps"):
        compare(torch_run, replace(torch_run, losses=torch_run.losses[1:]))


def test_summary_and_table(torch_run: Run) -> None:
    half = replace(torch_run, contestant="fused", loss_seconds=[], peak_bytes=torch_run.peak_bytes // 2 + 1)
    rows = summary([replace(torch_run, peak_bytes=1 << 30), replace(half, peak_bytes=1 << 29)])
    assert rows[1]["torch_over_peak_bytes"] == 2.0 and rows[1]["loss_s"] is None
    text = language_model.table(rows)
    assert "1024.0 (1.0x)" in text and "512.0 (2.0x)" in text and len(text.splitlines()) == 3


# ---- the commands ----


def test_demo_from_end_to_end(text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    arguments = ["language-model", "--out", str(out), "--corpus", str(text), "--vocabulary", str(VOCABULARY), "--quiet"]
    for name, value in asdict(replace(CONFIG, steps=6)).items():
        arguments += [f"--{name}", str(value)]
    assert softce.demo.main(arguments) == 0
    printed = capsys.readouterr().out
    assert "softce and torch agree" in printed and "softce.cross_entropy" in printed
    document = json.loads((out / "demo.json").read_text())
    assert [run["contestant"] for run in document["runs"]] == losses.default_names()
    assert all(len(run["losses"]) == 6 for run in document["runs"])
    assert document["agreement"]["softce"]["first_loss"] <= language_model.FIRST_LOSS
    assert (out / "demo.png").stat().st_size > 1000


def test_disagreement_is_an_exit_status(
    torch_run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], small: Corpus
) -> None:
    def run_apart(name: str, *_: object) -> Run:
        off = 0.0 if name == "torch" else 0.5
        return replace(torch_run, contestant=name, losses=[value + off for value in torch_run.losses])

    monkeypatch.setattr(language_model, "_run_apart", run_apart)
    monkeypatch.setattr(language_model, "prepare", lambda *_: small)
    arguments = ["--out", str(tmp_path), "--quiet", "--contestants", "softce"]
    assert language_model.main(arguments) == 1
    assert "DO NOT AGREE" in capsys.readouterr().out


def test_unknown_names_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert softce.demo.main(["no-such-demo"]) == 2
    assert language_model.main(["--contestants", "nobody"]) == 2
    assert "calibration" in capsys.readouterr().err


def test_demos_are_dispatched_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[list[str]] = []

    class Stand:
        @staticmethod
        def main(arguments: list[str]) -> int:
            calls.append(arguments)
            return 7

    monkeypatch.setitem(softce.demo.DEMOS, "calibration", ("stand_in_demo", "a stand-in"))
    assert softce.demo.main(["calibration"]) == 1  # not installed
    monkeypatch.setitem(sys.modules, "stand_in_demo", Stand)  # type: ignore[arg-type]
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    assert softce.demo.main(["calibration", "--x"]) == 7
    assert calls == [["--x"]]


def test_peak_meter_sees_what_was_freed_again() -> None:
    meter = PeakMeter()
    meter.start()
    block = torch.ones(1 << 23)
    del block
    peak = meter.peak()
    assert (1 << 25) * 0.95 <= peak <= (1 << 25) * 1.3
    meter.start()
    assert meter.peak() < 1 << 23

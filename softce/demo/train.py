# SPDX-License-Identifier: BSD-3-Clause
"""One contestant's training run, in a process of its own: ``python -m softce.demo.train`` (config on stdin)."""

from __future__ import annotations

import json
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from .. import _library
from .contestants import Contestant, contestants
from .corpus import Corpus
from .model import SmallLM
from .rss import PeakMeter

HELD_OUT = 0.02  # the last part of the corpus, for the loss on unseen text
HELD_OUT_BATCHES = 4


@dataclass(frozen=True)
class Config:
    """Everything that two runs of the same curve share."""

    steps: int
    seconds: float  # stop after this time, at the end of a step; 0: never
    batch: int = 8
    length: int = 128
    width: int = 128
    layers: int = 2
    heads: int = 4
    rate: float = 3e-3
    warmup: int = 10
    clip: float = 1.0
    seed: int = 0
    threads: int = 0  # 0: torch's choice


@dataclass
class Run:
    """What one run gave: one value a step in each list, times in seconds."""

    contestant: str
    label: str
    kernels: str  # what softce computed with, or why not with its kernels
    losses: list[float] = field(default_factory=list)
    gradient_norms: list[float] = field(default_factory=list)
    loss_seconds: list[float] = field(default_factory=list)  # loss alone, forward + backward; empty where fused
    head_seconds: list[float] = field(default_factory=list)  # output layer and loss, forward + backward
    step_seconds: list[float] = field(default_factory=list)
    peak_bytes: int = 0
    peak_exact: bool = True
    held_out_loss: float = 0.0


class Batches:
    """Windows of ``length + 1`` tokens at random places, the same for the same seed."""

    def __init__(self, tokens: Tensor, config: Config) -> None:
        self.tokens, self.config = tokens, config
        self.generator = torch.Generator().manual_seed(config.seed)

    def next(self) -> tuple[Tensor, Tensor]:
        length = self.config.length
        starts = torch.randint(self.tokens.numel() - length, (self.config.batch, 1), generator=self.generator)
        window = self.tokens[starts + torch.arange(length + 1)]
        return window[:, :-1], window[:, 1:].reshape(-1)


def _step_loss(contestant: Contestant, model: SmallLM, tokens: Tensor, target: Tensor, run: Run) -> Tensor:
    """Forward and backward of one step; stamps are taken as the gradient passes logits and hidden states."""
    stamps: dict[str, float] = {}

    def stamp(name: str) -> None:
        stamps[name] = time.perf_counter()

    def stamped(x: Tensor, name: str) -> Tensor:
        x.register_hook(lambda gradient: stamp(name))
        return x

    hidden = stamped(model(tokens), "hidden gradient")
    stamp("head")
    if contestant.fused:
        loss = contestant.loss(hidden, model.head, target)
    else:
        logits = stamped(F.linear(hidden, model.head), "logits gradient")
        stamp("loss")
        loss = contestant.loss(logits, target)
        del logits
    del hidden
    stamp("backward")
    loss.backward()
    backward = stamps["backward"]
    if not contestant.fused:
        run.loss_seconds.append(backward - stamps["loss"] + stamps["logits gradient"] - backward)
    run.head_seconds.append(backward - stamps["head"] + stamps["hidden gradient"] - backward)
    return loss.detach()


def _optimizer(model: SmallLM, config: Config) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LambdaLR]:
    """AdamW whose state exists already (a step with zero gradients moves nothing): no part of the loop's memory."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.rate, betas=(0.9, 0.95), weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / config.warmup))
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad()
    return optimizer, schedule


def _kernels(contestant: str) -> str:
    if contestant == "torch":
        return "torch"
    reason = _library.CPU.reason()
    return f"C++, {_library.isa_chosen()}" if reason is None else f"plain PyTorch, for {reason}"


def train(contestant: Contestant, corpus: Corpus, config: Config, quiet: bool = False) -> Run:
    """Trains one model with ``contestant`` and measures every step."""
    if config.threads:
        torch.set_num_threads(config.threads)
    torch.manual_seed(config.seed)
    tokens = corpus.load()
    split = int(tokens.numel() * (1 - HELD_OUT))
    model = SmallLM(corpus.vocabulary, config.width, config.layers, config.heads, config.length)
    optimizer, schedule = _optimizer(model, config)
    batches = Batches(tokens[:split], config)
    run = Run(contestant.name, contestant.label, _kernels(contestant.name))
    meter = PeakMeter()
    meter.start()
    start = time.perf_counter()
    bar = tqdm(range(config.steps), desc=f"{contestant.name:14s}", unit="step", disable=quiet)
    for _ in bar:
        began = time.perf_counter()
        loss = _step_loss(contestant, model, *batches.next(), run)
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), config.clip)
        optimizer.step()  # type: ignore[no-untyped-call,unused-ignore]
        schedule.step()
        optimizer.zero_grad()
        run.step_seconds.append(time.perf_counter() - began)
        run.losses.append(float(loss))
        run.gradient_norms.append(float(norm))
        bar.set_postfix_str(f"loss {run.losses[-1]:.3f}")
        if config.seconds and time.perf_counter() - start > config.seconds:
            break
    bar.close()
    run.peak_bytes, run.peak_exact = meter.peak(), meter.exact
    run.held_out_loss = _held_out(model, tokens[split:], config)
    return run


@torch.no_grad()
def _held_out(model: SmallLM, tokens: Tensor, config: Config) -> float:
    """Mean loss on unseen text, by torch's loss for every contestant."""
    batches = Batches(tokens, config)
    losses = []
    for _ in range(HELD_OUT_BATCHES):
        inputs, target = batches.next()
        losses.append(float(F.cross_entropy(F.linear(model(inputs), model.head), target)))
    return sum(losses) / len(losses)


def main() -> None:
    job: dict[str, Any] = json.load(sys.stdin)
    run = train(contestants()[job["contestant"]], Corpus(**job["corpus"]), Config(**job["config"]), job["quiet"])
    Path(job["out"]).write_text(json.dumps(asdict(run)))


if __name__ == "__main__":
    main()

# SPDX-License-Identifier: BSD-3-Clause
"""Real text that every machine has: the Python standard library's own source, as tokens.

A byte-level BPE tokenizer is trained on it by Hugging Face ``tokenizers``; tokenizer and tokens are kept in a folder
and made anew only when the text or the size of the vocabulary has changed.
"""

from __future__ import annotations

import hashlib
import json
import sysconfig
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

# Not every distribution ships these folders of the standard library.
NOT_EVERYWHERE = {"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3", "__pycache__"}
END = "<|end|>"
BATCH = 64


@dataclass(frozen=True)
class Corpus:
    """What ``prepare`` made: ``tokens`` is a file with one int32 tensor."""

    folder: str
    files: int
    text_bytes: int
    vocabulary: int
    tokens: int
    fingerprint: str

    def load(self) -> Tensor:
        """All tokens, ``(tokens,)`` int64, files separated by an end token."""
        stored: Tensor = torch.load(Path(self.folder) / "tokens.pt", weights_only=True)
        return stored.long()


def sources(root: Path | None = None) -> list[Path]:
    """The files of the corpus in a fixed order: all of ``root``, or the standard library.

    Raises:
        FileNotFoundError: no source file there (some systems keep the standard library in a zip file).
    """
    if root is not None:
        found = sorted(path for path in root.rglob("*") if path.suffix in (".py", ".txt", ".md", ".rst"))
    else:
        root = Path(sysconfig.get_paths()["stdlib"])
        found = sorted(path for path in root.rglob("*.py") if not NOT_EVERYWHERE & set(path.relative_to(root).parts))
    if not found:
        raise FileNotFoundError(f"no source files under {root}: name a folder of text with --corpus")
    return found


def _fingerprint(files: Sequence[Path], vocabulary: int) -> str:
    digest = hashlib.sha256(f"{vocabulary} {END}".encode())
    for path in files:
        status = path.stat()
        digest.update(f"{path} {status.st_size} {status.st_mtime_ns}".encode())
    return digest.hexdigest()


def prepare(folder: Path, vocabulary: int, root: Path | None = None, quiet: bool = False) -> Corpus:
    """Tokenizer and tokens of the corpus in ``folder``; does nothing where they are up to date."""
    files = sources(root)
    fingerprint = _fingerprint(files, vocabulary)
    facts = folder / "corpus.json"
    if facts.exists() and (folder / "tokens.pt").exists():
        known = Corpus(**json.loads(facts.read_text()))
        if known.fingerprint == fingerprint:
            return Corpus(**{**asdict(known), "folder": str(folder)})
    folder.mkdir(parents=True, exist_ok=True)
    texts = [
        path.read_text(encoding="utf-8", errors="replace")
        for path in tqdm(files, desc="reading the corpus", unit="file", disable=quiet)
    ]
    tokens = _tokenize(texts, vocabulary, folder, quiet)
    torch.save(tokens, folder / "tokens.pt")
    size = sum(len(text.encode()) for text in texts)
    corpus = Corpus(str(folder), len(files), size, vocabulary, tokens.numel(), fingerprint)
    facts.write_text(json.dumps(asdict(corpus), indent=1) + "\n")
    return corpus


def _tokenize(texts: Sequence[str], vocabulary: int, folder: Path, quiet: bool) -> Tensor:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=not quiet,
    )
    tokenizer.train_from_iterator(texts, trainer, length=len(texts))
    tokenizer.save(str(folder / "tokenizer.json"))
    end = tokenizer.token_to_id(END)
    assert end is not None

    def pieces() -> Iterator[int]:
        for start in tqdm(range(0, len(texts), BATCH), desc="tokenizing", unit="batch", disable=quiet):
            for encoded in tokenizer.encode_batch(texts[start : start + BATCH]):
                yield from encoded.ids
                yield end

    return torch.tensor(list(pieces()), dtype=torch.int32)

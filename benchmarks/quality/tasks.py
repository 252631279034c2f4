"""What is learned: small tasks that need no download, each with its data, its model and its score."""

from __future__ import annotations

import functools
import importlib
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from rarefy.data.text_corpus import ByteWindows, TextCorpusConfig, TextCorpusDataProcessor
from rarefy.models import GPTConfig, GPTModel

# Tuning runs learn from the first four fifths of the training data and are judged on the rest.
TUNING_SHARE = 0.8


class Task(Protocol):
    """A task: its budget, and what a loop needs to train and judge a model."""

    @property
    def name(self) -> str:
        """As it stands in files and tables."""
        ...

    @property
    def metric(self) -> str:
        """What `score` returns: `accuracy` in percent, or `bits_per_byte`."""
        ...

    @property
    def width(self) -> int:
        """Of the dense model, and of the one that becomes sparse."""
        ...

    @property
    def steps(self) -> int:
        """Optimizer steps of every run."""
        ...

    @property
    def clip(self) -> float:
        """The largest norm of all gradients together."""
        ...

    @property
    def warmup(self) -> float:
        """The part of the steps in which the learning rate rises."""
        ...

    @property
    def compute(self) -> str:
        """How sparse weights are stored: `masked` where layers are so small that nothing else pays."""
        ...

    def model(self, width: int) -> nn.Module:
        """A fresh model; its layers but the first and the last are `width` wide."""
        ...

    def batches(self, seed: int, tuning: bool, size: int | None = None) -> Iterator[Any]:
        """Random batches without end, the same for the same seed."""
        ...

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        """The mean loss of a batch, in nats."""
        ...

    def score(self, model: nn.Module, tuning: bool) -> float:
        """The metric on what training did not see."""
        ...


@dataclass(frozen=True)
class Examples:
    """Inputs and classes, those of training and those of the test."""

    x: Tensor
    y: Tensor
    x_test: Tensor
    y_test: Tensor

    def split(self, tuning: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """What to train on and what to judge by; tuning never sees the test."""
        if not tuning:
            return self.x, self.y, self.x_test, self.y_test
        cut = int(len(self.x) * TUNING_SHARE)
        return self.x[:cut], self.y[:cut], self.x[cut:], self.y[cut:]


@dataclass(frozen=True)
class Classification:
    """Classes of vectors, with cross-entropy; the score is the accuracy in percent."""

    name: str
    data: Callable[[], Examples]
    build: Callable[[int], nn.Module]
    width: int
    steps: int
    batch_size: int = 128
    metric: str = "accuracy"
    compute: str = "masked"
    clip: float = float("inf")
    warmup: float = 0.05

    def model(self, width: int) -> nn.Module:
        """A fresh model of this width."""
        return self.build(width)

    def batches(self, seed: int, tuning: bool, size: int | None = None) -> Iterator[tuple[Tensor, Tensor]]:
        """Batches drawn with replacement."""
        x, y, _, _ = self.data().split(tuning)
        generator = torch.Generator().manual_seed(seed)
        while True:
            # Many batches at once: drawing them one by one would cost as much as a layer.
            for index in torch.randint(0, len(x), (64, size or self.batch_size), generator=generator):
                yield x[index], y[index]

    def loss(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        """Cross-entropy."""
        return functional.cross_entropy(model(batch[0]), batch[1])

    def score(self, model: nn.Module, tuning: bool) -> float:
        """Accuracy in percent."""
        _, _, x, y = self.data().split(tuning)
        with torch.no_grad():
            return float((model(x).argmax(1) == y).double().mean()) * 100


@dataclass(frozen=True)
class ByteText:
    """The next byte of the standard library's sources, with a small GPT; the score is bits per byte."""

    name: str = "stdlib_gpt"
    width: int = 128
    steps: int = 400
    batch_size: int = 8
    length: int = 64
    layers: int = 2
    judged: int = 384
    metric: str = "bits_per_byte"
    compute: str = "auto"
    clip: float = 1.0
    # A dense GPT of so few steps stays at 3.2 bits per byte with a twentieth, and gets to 3.1 with a fifth.
    warmup: float = 0.2

    def model(self, width: int) -> nn.Module:
        """A GPT with four heads and a feed-forward part four times as wide."""
        config = GPTConfig(
            vocab_size=256,
            hidden_size=width,
            num_hidden_layers=self.layers,
            num_heads=4,
            filter_size=4 * width,
            max_position_embeddings=self.length,
            dropout_rate=0.0,
            attention_dropout_rate=0.0,
        )
        return GPTModel(config)

    def batches(self, seed: int, tuning: bool, size: int | None = None) -> Iterator[Mapping[str, Tensor]]:
        """Batches of windows drawn with replacement."""
        windows = stdlib("train", self.length)
        generator = torch.Generator().manual_seed(seed)
        count = int(len(windows) * (TUNING_SHARE if tuning else 1))
        while True:
            index = torch.randint(0, count, (size or self.batch_size,), generator=generator)
            yield stacked(windows, index.tolist())

    def loss(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        """Cross-entropy of the next byte."""
        answer = model(batch)
        return answer[0] if isinstance(answer, tuple) else answer

    def score(self, model: nn.Module, tuning: bool) -> float:
        """Bits per byte on evenly spaced windows."""
        windows = stdlib("train" if tuning else "validation", self.length)
        first = int(len(windows) * TUNING_SHARE) if tuning else 0
        index = torch.linspace(first, len(windows) - 1, self.judged).long()
        with torch.no_grad():
            losses = [float(self.loss(model, stacked(windows, part.tolist()))) for part in index.split(32)]
        return sum(losses) / len(losses) / math.log(2)


def stacked(windows: ByteWindows, index: list[int]) -> Mapping[str, Tensor]:
    samples = [windows[one] for one in index]
    return {key: torch.stack([sample[key] for sample in samples]) for key in samples[0]}


@functools.cache
def stdlib(split: Any, length: int) -> ByteWindows:
    return TextCorpusDataProcessor(
        TextCorpusConfig(sequence_length=length, batch_size=1, split=split)
    ).dataset


@functools.cache
def mnist1d() -> Examples:
    """MNIST-1D with its generator's default arguments (Greydanus, arXiv:2011.14439): 4000 and 1000 signals of 40."""
    data = importlib.import_module("mnist1d.data").make_dataset()
    # The generator seeds numpy for the whole process.
    np.random.seed(None)
    x, x_test = (torch.tensor(data[key], dtype=torch.float32) for key in ("x", "x_test"))
    return Examples(x, torch.tensor(data["y"]), x_test, torch.tensor(data["y_test"]))


@functools.cache
def digits() -> Examples:
    """scikit-learn's digits, 8 by 8 pixels: 1347 to train on and 450 for the test, shuffled once."""
    from sklearn.datasets import load_digits

    pixels, classes = load_digits(return_X_y=True)
    order = torch.randperm(len(pixels), generator=torch.Generator().manual_seed(0))
    x = torch.tensor(pixels, dtype=torch.float32)[order] / 16
    y = torch.tensor(classes)[order]
    return Examples(x[:1347], y[:1347], x[1347:], y[1347:])


def mlp(inputs: int) -> Callable[[int], nn.Module]:
    """Two hidden layers, ReLU."""

    def build(width: int) -> nn.Module:
        return nn.Sequential(
            nn.Linear(inputs, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 10)
        )

    return build


def wide_mlp(width: int) -> nn.Module:
    """The same; only the layer between the hidden ones can become sparse, in which every structure fits."""
    layers = mlp(40)(width)
    assert isinstance(layers, nn.Sequential)
    for outer in (layers[0], layers[-1]):
        outer.requires_dense = True  # pyright: ignore[reportArgumentType]
    return layers


def conv_net(width: int) -> nn.Module:
    """Three convolutions of stride 2 and a linear layer; the first convolution, 5 weights a channel, stays dense."""
    first = nn.Conv1d(1, width, 5, stride=2, padding=2)
    first.requires_dense = True  # pyright: ignore[reportArgumentType]
    return nn.Sequential(
        nn.Unflatten(1, (1, 40)),
        first,
        nn.ReLU(),
        nn.Conv1d(width, width, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Conv1d(width, width, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(5 * width, 10),
    )


TASKS: Mapping[str, Task] = {
    task.name: task
    for task in (
        Classification("mnist1d_mlp", mnist1d, mlp(40), width=256, steps=1000),
        Classification("mnist1d_conv", mnist1d, conv_net, width=32, steps=800),
        Classification("mnist1d_wide", mnist1d, wide_mlp, width=1024, steps=600, compute="auto"),
        Classification("digits_mlp", digits, mlp(64), width=128, steps=400, batch_size=64),
        ByteText(),
    )
}

"""Embeddings of tokens and what belongs to positions: learned or fixed vectors, or the slopes of alibi."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from rarefy.decoder.decoder_config import GPTConfig

_LONGEST_WAVE = 1.0e4


class EmbeddingLayer(nn.Module):
    """Word embedding plus position embedding; it also holds what alibi adds to the scores of attention.

    Args:
        config: of the model.
    """

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        kind = config.position_embedding_type
        self.word_embeddings = nn.Embedding(config.vocab_size, config.hidden_size)
        self.position_embeddings = _POSITIONS[kind](config) if kind in _POSITIONS else None
        self.position_embed_helper = (
            Alibi(config.num_heads, config.pos_scaling_factor, config.alibi_trainable_slopes)
            if kind == "alibi"
            else None
        )
        rate = config.embedding_dropout_rate
        self.dropout = nn.Dropout(config.dropout_rate if rate is None else rate)

    def forward(self, input_ids: Tensor) -> Tensor:
        """Embeddings [batch, sequence, hidden], before dropout."""
        words = self.word_embeddings(input_ids)
        if self.position_embeddings is None:
            return words
        return words + self.position_embeddings(input_ids.shape[1])


class PositionEmbedding(nn.Module):
    """One learned vector a position."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.embed = nn.Embedding(config.max_position_embeddings, config.hidden_size)

    def forward(self, length: int) -> Tensor:
        """The vectors [length, hidden] of the first positions."""
        return self.embed(torch.arange(length, device=self.embed.weight.device))


class FixedPositionEmbedding(nn.Module):
    """Sines and cosines of the position, with wave lengths from 2π to 10000 · 2π.

    Reference:
        Vaswani et al., arXiv 1706.03762.
    """

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        table = _waves(config.max_position_embeddings, config.hidden_size)
        # A parameter that is not trained, as in the Model Zoo's checkpoints.
        self.fpe = nn.Parameter(table, requires_grad=False)

    def forward(self, length: int) -> Tensor:
        """The vectors [length, hidden] of the first positions."""
        return self.fpe[:length]


def _waves(length: int, size: int) -> Tensor:
    """[length, size]: entries 2i and 2i + 1 are sine and cosine of one wave; an odd last entry is 0."""
    count = size // 2
    step = math.log(_LONGEST_WAVE) / max(count - 1, 1)
    frequencies = torch.exp(-step * torch.arange(count, dtype=torch.float32))
    angles = torch.arange(length, dtype=torch.float32).unsqueeze(1) * frequencies
    table = torch.stack((angles.sin(), angles.cos()), dim=2).flatten(1)
    return nn.functional.pad(table, (0, size % 2))


class Alibi(nn.Module):
    """The bias −slope · distance of every head.

    Args:
        num_heads: number of heads.
        scaling: distances are divided by it.
        trainable: whether the slopes are trained; they then start at random.

    Example:
        >>> Alibi(2)(2)[0].tolist()
        [[-0.0, -0.0625], [-0.0625, -0.0]]

    Reference:
        Press et al., arXiv 2108.12409.
    """

    def __init__(self, num_heads: int, scaling: float = 1.0, trainable: bool = False) -> None:
        super().__init__()
        self.scaling = scaling
        # A parameter even when fixed, as in the Model Zoo's checkpoints.
        self.slopes = nn.Parameter(torch.tensor(slopes(num_heads)).unsqueeze(1), requires_grad=trainable)
        if trainable:
            nn.init.xavier_uniform_(self.slopes)

    def forward(self, length: int) -> Tensor:
        """The biases [heads, length, length]."""
        positions = torch.arange(length, device=self.slopes.device)
        distances = (positions.unsqueeze(1) - positions).abs()
        return -self.slopes.unsqueeze(2) / self.scaling * distances


def slopes(num_heads: int) -> list[float]:
    """The slopes of the paper: 2^(−8/n), its square, …; for other n than powers of two, every second of the next one's.

    Example:
        >>> slopes(4), slopes(3)
        ([0.25, 0.0625, 0.015625, 0.00390625], [0.0625, 0.00390625, 0.25])
    """
    power = 2 ** math.floor(math.log2(num_heads))
    own = [2.0 ** (-8 * step / power) for step in range(1, power + 1)]
    if power == num_heads:
        return own
    return own + slopes(2 * power)[::2][: num_heads - power]


_POSITIONS = {"learned": PositionEmbedding, "fixed": FixedPositionEmbedding}

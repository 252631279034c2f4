"""The loss of next-token prediction, its metrics, and the checks of its batches."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from rarefy.errors import ConfigError

if TYPE_CHECKING:
    # The decoder's many keys are none of another model's business.
    from rarefy.decoder.decoder_config import LossScaling

BYTE_VOCABULARY = 256
# Entries of a part of a batch, beside those of the batch itself.
WHOLE_NORMALIZER = "whole_normalizer"
SHARE_OF_SAMPLES = "share_of_samples"


class LanguageModelOutput(NamedTuple):
    """What a language model returns in eval mode; every field is a scalar tensor.

    Attributes:
        loss: nll / normalizer.
        nll: Σ cross entropy · loss mask, in nats.
        normalizer: what the loss is divided by.
        weight: Σ loss mask, the number of tokens that count.
        correct: Σ loss mask over the tokens whose most probable prediction is the label.
    """

    loss: Tensor
    nll: Tensor
    normalizer: Tensor
    weight: Tensor
    correct: Tensor


@dataclass(frozen=True)
class LanguageModelLoss:
    """Cross entropy of the next token, in float32, of float64 logits in float64.

    Σ(CE · mask) / Σ mask with `num_tokens`, Σ(CE · mask) / batch size · weight with `batch_size`.

    Args:
        scaling: `num_tokens` or `batch_size`.
        weight: factor of the loss; used with `batch_size` only.

    Example:
        >>> batch = {"input_ids": torch.zeros(1, 2, dtype=torch.int64), "labels": torch.tensor([[0, 1]])}
        >>> loss = LanguageModelLoss()(torch.zeros(1, 2, 4), batch)
        >>> round(float(loss), 4)
        1.3863
    """

    scaling: LossScaling = "num_tokens"
    weight: float = 1.0

    def __call__(self, logits: Tensor, batch: Mapping[str, Tensor]) -> Tensor:
        """The loss of one batch.

        Args:
            logits: [batch, sequence, vocabulary].
            batch: `labels` [batch, sequence] and, where given, the loss mask of the same shape.

        Returns:
            A scalar. Of a part of a batch (`parts_of`), its share of the loss of the whole.
        """
        mask = loss_mask(batch)
        whole = batch.get(WHOLE_NORMALIZER)
        return self._nll(logits, batch, mask) / _at_least(self._normalizer(mask) if whole is None else whole)

    def detailed(self, logits: Tensor, batch: Mapping[str, Tensor]) -> LanguageModelOutput:
        """The loss of one batch and the sums behind it; the arguments are the same."""
        mask = loss_mask(batch)
        nll = self._nll(logits, batch, mask)
        normalizer = _at_least(self._normalizer(mask))
        correct = ((logits.argmax(-1) == batch["labels"]) * mask).sum()
        return LanguageModelOutput(nll / normalizer, nll, normalizer, mask.sum(), correct)

    def parts_of(self, batch: Mapping[str, Tensor], size: int) -> Iterator[dict[str, Tensor]]:
        """A batch in parts of at most `size` samples, whose losses and gradients add up to those of the whole.

        Each part is told what the loss of the whole is divided by, and which share of the samples it has.

        Example:
            >>> ids = torch.zeros(3, 2, dtype=torch.int64)
            >>> parts = LanguageModelLoss().parts_of({"input_ids": ids, "labels": ids}, 2)
            >>> [(len(part["labels"]), float(part["whole_normalizer"])) for part in parts]
            [(2, 6.0), (1, 6.0)]
        """
        samples = len(batch["labels"])
        normalizer = self._normalizer(loss_mask(batch))
        for begin in range(0, samples, size):
            part = {key: value[begin : begin + size] for key, value in batch.items()}
            share = torch.tensor(len(part["labels"]) / samples, dtype=torch.float64)
            yield {**part, WHOLE_NORMALIZER: normalizer, SHARE_OF_SAMPLES: share}

    def _nll(self, logits: Tensor, batch: Mapping[str, Tensor], mask: Tensor) -> Tensor:
        # Where the mask is 0 a label may be anything, and cross_entropy reads memory by it.
        labels = batch["labels"].masked_fill(mask == 0, 0).long()
        # At least float32: in bfloat16 the logarithm of a sum over the vocabulary has three digits.
        precise = logits.to(torch.promote_types(logits.dtype, torch.float32)).flatten(0, 1)
        losses = functional.cross_entropy(precise, labels.flatten(), reduction="none")
        return (losses * mask.flatten()).sum()

    def _normalizer(self, mask: Tensor) -> Tensor:
        tokens = mask.sum()
        return tokens if self.scaling == "num_tokens" else torch.full_like(tokens, len(mask) / self.weight)


def _at_least(normalizer: Tensor) -> Tensor:
    """A batch without a token that counts has loss 0, not 0/0."""
    return torch.where(normalizer > 0, normalizer, 1.0)


class LanguageModelMetrics:
    """`eval/loss`, `eval/lm_perplexity` and `eval/accuracy`, weighted by tokens over all batches.

    The perplexity is exp(Σ nll / Σ tokens), the accuracy Σ correct / Σ tokens. With byte tokens
    `eval/bits_per_byte` is Σ nll / (Σ tokens · ln 2).

    Args:
        vocab_size: size of the vocabulary; 256 means byte tokens.

    Example:
        >>> metrics = LanguageModelMetrics(vocab_size=256)
        >>> one = torch.tensor(1.0)
        >>> metrics.update(LanguageModelOutput(one, nll=one, normalizer=one, weight=one, correct=one), {})
        >>> {name: round(value, 3) for name, value in metrics.compute().items()}
        {'eval/loss': 1.0, 'eval/lm_perplexity': 2.718, 'eval/accuracy': 1.0, 'eval/bits_per_byte': 1.443}
    """

    def __init__(self, vocab_size: int) -> None:
        self.byte_tokens = vocab_size == BYTE_VOCABULARY
        # float32 stops counting at 2^24 tokens.
        self.totals = torch.zeros(4, dtype=torch.float64)  # nll, normalizer, weight, correct

    def update(self, outputs: LanguageModelOutput, batch: Any) -> None:
        """Adds one batch.

        Args:
            outputs: what the model returned for it in eval mode.
            batch: not used.
        """
        self.totals += torch.stack(outputs[1:]).detach().cpu().double()

    def compute(self) -> dict[str, float]:
        """The metrics over all batches so far; not a number before the first token."""
        nll, normalizer, weight, correct = self.totals
        per_token = nll / weight
        metrics = {
            "eval/loss": float(nll / normalizer),
            "eval/lm_perplexity": float(per_token.exp()),
            "eval/accuracy": float(correct / weight),
        }
        if self.byte_tokens:
            metrics["eval/bits_per_byte"] = float(per_token) / math.log(2)
        return metrics


def loss_mask(batch: Mapping[str, Tensor]) -> Tensor:
    """Which labels count, as float32: `loss_mask`, else `attention_mask` (Model Zoo's name for it), else all.

    Example:
        >>> loss_mask({"labels": torch.tensor([[3, 4]]), "attention_mask": torch.tensor([[1, 0]])})
        tensor([[1., 0.]])
    """
    mask = batch.get("loss_mask", batch.get("attention_mask"))
    return torch.ones_like(batch["labels"], dtype=torch.float32) if mask is None else mask.float()


def check_shapes(batch: Any, *, max_length: int | None = None) -> None:
    """Checks that a batch has the fields of next-token prediction, in shapes that agree.

    Args:
        batch: what should be a mapping with `input_ids` and `labels`, both [batch, sequence].
        max_length: the longest sequence allowed, in tokens.

    Raises:
        ConfigError: a field is missing, a shape differs, or the sequence is too long.
    """
    if not isinstance(batch, Mapping) or not {"input_ids", "labels"} <= set(batch):
        given = sorted(map(str, batch)) if isinstance(batch, Mapping) else type(batch).__name__
        raise ConfigError("batch", f"{given}", "a dict with input_ids and labels")
    shape = batch["input_ids"].shape
    for name in ("input_ids", "labels", "loss_mask", "attention_mask"):
        if name in batch and (len(shape) != 2 or batch[name].shape != shape):
            sizes = list(batch[name].shape)
            raise ConfigError(f"batch.{name}", f"the shape {sizes}", "[batch, sequence], as in input_ids")
    if max_length is not None and shape[1] > max_length:
        allowed = f"at most {max_length} tokens, or a larger max_position_embeddings"
        raise ConfigError("batch.input_ids", f"a sequence of {shape[1]} tokens", allowed)


def check_token_ids(batch: Mapping[str, Tensor], vocab_size: int) -> None:
    """Checks that every token id is in the vocabulary; labels outside the loss mask may hold anything.

    Args:
        batch: `input_ids`, `labels` and, where given, the loss mask.
        vocab_size: ids run from 0 to vocab_size - 1.

    Raises:
        ConfigError: an id is out of range; the message names it.

    Example:
        >>> check_token_ids({"input_ids": torch.tensor([[7]]), "labels": torch.tensor([[8]])}, vocab_size=9)
    """
    labels = batch["labels"].masked_fill(loss_mask(batch) == 0, 0)
    for name, ids in (("input_ids", batch["input_ids"]), ("labels", labels)):
        if not ids.numel():
            continue
        low, high = (int(bound) for bound in torch.aminmax(ids))
        if low < 0 or high >= vocab_size:
            allowed = f"ids from 0 to {vocab_size - 1}, or set vocab_size ({vocab_size}) to the tokenizer's"
            raise ConfigError(f"batch.{name}", f"the token id {low if low < 0 else high}", allowed)

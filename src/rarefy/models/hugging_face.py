"""Transformers' models behind the interface of this package."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor, nn

from rarefy.models.language_modeling import (
    LanguageModelLoss,
    LanguageModelMetrics,
    LanguageModelOutput,
    check_shapes,
    check_token_ids,
)


def is_hugging_face(kind: Any) -> bool:
    """Whether a class is built from one configuration object, as Transformers' model classes are."""
    return isinstance(kind, type) and getattr(kind, "config_class", None) is not None


def wrap(model: nn.Module) -> nn.Module:
    """Gives a Transformers model a `forward` that takes a batch; its parameters get the prefix `model.`."""
    # By name: Transformers has no class that these, and they alone, have in common.
    causal = type(model).__name__.endswith(("LMHeadModel", "ForCausalLM"))
    return HuggingFaceCausalModel(model) if causal else HuggingFaceModel(model)


class HuggingFaceModel(nn.Module):
    """A Transformers model that gets the entries of the batch as keyword arguments.

    Args:
        model: its `forward` takes the batch's keys and returns an object with `.loss`.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch: Mapping[str, Any]) -> Any:
        """What the model returns for this batch."""
        return self.model(**batch)


class HuggingFaceCausalModel(nn.Module):
    """A Transformers causal language model with the loss and the metrics of `GPTModel`.

    As everywhere in rarefy `labels` are already shifted by one, and `attention_mask` is the loss mask; the
    model itself sees `input_ids` only.

    Args:
        model: its `forward` takes `input_ids` and returns an object with `.logits`.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        config: Any = model.config
        # Keys and values are kept for generating text, and cost memory in training.
        config.use_cache = False
        self.vocab_size: int = config.vocab_size
        self.loss = LanguageModelLoss()

    def forward(self, batch: Mapping[str, Tensor]) -> Tensor | LanguageModelOutput:
        """The loss of one batch in train mode, a `LanguageModelOutput` in eval mode.

        Raises:
            ConfigError: a field is missing or a shape differs.
        """
        check_shapes(batch)
        logits = self.model(input_ids=batch["input_ids"]).logits
        return self.loss(logits, batch) if self.training else self.loss.detailed(logits, batch)

    def check_batch(self, batch: Mapping[str, Tensor]) -> None:
        """Whether this model can run on a batch; reads the batch's values.

        Raises:
            ConfigError: a field is missing, a shape differs, or a token id is outside the vocabulary.
        """
        check_shapes(batch)
        check_token_ids(batch, self.vocab_size)

    def parts_of(self, batch: Mapping[str, Tensor], size: int) -> Iterator[dict[str, Tensor]]:
        """A batch in parts of at most `size` samples, whose losses and gradients add up to those of the whole."""
        return self.loss.parts_of(batch, size)

    def eval_metrics(self) -> LanguageModelMetrics:
        """A fresh accumulator of `eval/loss`, `eval/lm_perplexity` and `eval/accuracy`."""
        return LanguageModelMetrics(self.vocab_size)

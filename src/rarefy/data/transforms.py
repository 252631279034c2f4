"""What `data_transforms` may do to samples."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor
from torch.utils.data import Dataset

from rarefy.errors import ConfigError

_Whole = Annotated[int, Field(ge=0, description="a whole number ≥ 0")]
_Count = Annotated[int, Field(ge=1, description="a whole number ≥ 1")]


class AddSinkTokens(BaseModel):
    """Puts tokens into every sample that attention may rest on; they do not count in the loss.

    Args:
        name: `add_sink_tokens`.
        sink_token_id: the token.
        num_sink_tokens: how many.
        sink_token_start_pos: where they go.
        truncate_to_original_length: whether the samples stay as long as they were.

    Reference:
        Xiao et al., Efficient Streaming Language Models with Attention Sinks, arXiv 2309.17453.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, defer_build=True)

    name: Literal["add_sink_tokens"]
    sink_token_id: _Whole = 0
    num_sink_tokens: _Count = 1
    sink_token_start_pos: _Whole = 0
    truncate_to_original_length: bool = False
    use_vsl: Literal[False] = False

    def __call__(self, sample: dict[str, Tensor]) -> dict[str, Tensor]:
        """A sample with the tokens in it.

        Raises:
            ConfigError: the tokens would go behind the end.

        Example:
            >>> sample = {"input_ids": torch.tensor([5, 6]), "attention_mask": torch.tensor([1, 1])}
            >>> AddSinkTokens(name="add_sink_tokens", sink_token_id=9)(sample)
            {'input_ids': tensor([9, 5, 6]), 'attention_mask': tensor([0, 1, 1])}
        """
        return {
            # The mask is that of the loss, in which the new tokens do not count.
            name: self._insert(values, 0 if name == "attention_mask" else self.sink_token_id)
            for name, values in sample.items()
        }

    def _insert(self, values: Tensor, token: int) -> Tensor:
        begin = self.sink_token_start_pos
        if begin > len(values):
            raise ConfigError("data_transforms.sink_token_start_pos", begin, f"at most {len(values)}")
        sinks = values.new_full((self.num_sink_tokens,), token)
        whole = torch.cat((values[:begin], sinks, values[begin:]))
        return whole[: len(values)] if self.truncate_to_original_length else whole


class Transformed(Dataset[dict[str, Tensor]]):
    """The samples of a data set, transformed when they are read.

    Args:
        dataset: with `largest_token`.
        transform: of each sample.
    """

    def __init__(self, dataset: Any, transform: AddSinkTokens) -> None:
        self.dataset = dataset
        self.transform = transform

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return self.transform(self.dataset[index])

    def __len__(self) -> int:
        return len(self.dataset)

    def largest_token(self) -> int | None:
        """The largest token id; None where the data is too large to be read for that."""
        largest = self.dataset.largest_token()
        return None if largest is None else max(largest, self.transform.sink_token_id)

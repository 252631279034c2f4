"""One architecture of Transformers: what it can compute, its options, and its names of tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rarefy.architectures.changes import SAME, Change
from rarefy.decoder.decoder_config import GPTConfig

Options = Mapping[str, Any]
LEAVES = ("weight", "bias")


@dataclass(frozen=True)
class Row:
    """A line of the table of names; several names on a side where one tensor holds what others hold apart.

    Args:
        there: names in the file.
        here: names in the decoder.
        change: between their tensors.
    """

    there: tuple[str, ...]
    here: tuple[str, ...]
    change: Change = SAME

    def below(self, there: str, here: str) -> Row:
        """The same row with a prefix on each side."""
        return Row(
            tuple(there + name for name in self.there), tuple(here + name for name in self.here), self.change
        )


@dataclass(frozen=True)
class Architecture:
    """What rarefy knows of an architecture.

    Args:
        model_type: its name in `config.json`.
        model_class: the class that Transformers loads it with.
        model: the decoder's name here.
        allowed: key of the decoder → what it can be there.
        sizes: option of `config.json` → key of the decoder, where both mean the same.
        defaults: options that a `config.json` may leave out.
        options: further options of a decoder.
        keys: further keys of the decoder that options stand for.
        outer: the rows outside the layers.
        inner: the rows of a layer, without prefixes.
        layers: the prefix of a layer in the file, with `{}` for its number.
        misfits: further things that it cannot do, each as a text.
        ignored: ends of names of tensors in files that are no weights.
        embeddings_scale: what it multiplies embeddings by.
    """

    model_type: str
    model_class: str
    model: str
    allowed: Mapping[str, tuple[Any, ...]]
    sizes: Mapping[str, str]
    defaults: Options
    options: Callable[[GPTConfig], dict[str, Any]]
    keys: Callable[[Options], dict[str, Any]]
    outer: Callable[[GPTConfig], Sequence[Row]]
    inner: Callable[[GPTConfig], Sequence[Row]]
    layers: str
    misfits: Callable[[GPTConfig], Iterator[str]] = lambda config: iter(())
    ignored: tuple[str, ...] = ()
    embeddings_scale: Callable[[GPTConfig], float] = lambda config: 1.0

    def objections(self, config: GPTConfig) -> list[str]:
        """What of a decoder it cannot compute, as `key: value`; empty where it computes the same."""
        found = [
            _say(key, value)
            for key, allowed in self.allowed.items()
            if (value := getattr(config, key)) not in allowed
        ]
        # A factor of 0 could not be taken back at the output layer.
        zero = ["embeddings_scale: 0"] if config.embeddings_scale == 0 else []
        return [*found, *self.misfits(config), *zero]

    def rows(self, config: GPTConfig) -> Iterator[Row]:
        """Every row of the table of names, layer by layer."""
        yield from self.outer(config)
        # Once for all layers, which have the same rows.
        inner = self.inner(config)
        for index in range(config.num_hidden_layers):
            for row in inner:
                yield row.below(self.layers.format(index), f"transformer_decoder.layers.{index}.")

    def as_options(self, config: GPTConfig) -> dict[str, Any]:
        """The content of `config.json` for a decoder."""
        sizes = {option: getattr(config, key) for option, key in self.sizes.items()}
        kind = {"architectures": [self.model_class], "model_type": self.model_type}
        return {**kind, **sizes, **self.options(config)}

    def as_keys(self, options: Options) -> dict[str, Any]:
        """The `model` block for a `config.json`, with its name."""
        given = {**self.defaults, **options}
        sizes = {key: given[option] for option, key in self.sizes.items()}
        return {"name": self.model, **sizes, **self.keys(given)}


def same(names: Mapping[str, str], leaves: Sequence[str] = LEAVES, change: Change = SAME) -> list[Row]:
    """Rows of modules that differ by name, and in a change of each tensor."""
    return [
        Row((f"{there}.{leaf}",), (f"{here}.{leaf}",), change)
        for there, here in names.items()
        for leaf in leaves
    ]


def joined(there: str, change: Change, leaves: Sequence[str] = LEAVES) -> list[Row]:
    """Rows of the projections to queries, keys and values, which are one module in the file."""
    return [
        Row(
            (f"{there}.{leaf}",), tuple(f"self_attn.proj_{name}_dense_layer.{leaf}" for name in "qkv"), change
        )
        for leaf in leaves
    ]


def leaves(has_bias: bool) -> tuple[str, ...]:
    """`weight`, and `bias` where there is one."""
    return LEAVES if has_bias else LEAVES[:1]


def without(allowed: Mapping[str, tuple[Any, ...]], *keys: str) -> dict[str, tuple[Any, ...]]:
    """A table of what keys can be, without some keys, which can then be anything."""
    return {key: values for key, values in allowed.items() if key not in keys}


def in_yaml(value: Any) -> str:
    """A value as a file has it.

    Example:
        >>> in_yaml(None), in_yaml(True), in_yaml(0.5)
        ('null', 'true', '0.5')
    """
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return str(value)


def _say(key: str, value: Any) -> str:
    if key != "is_parallel":
        return f"{key}: {in_yaml(value)}"
    return "attention beside the feed-forward part" if value else "attention before the feed-forward part"


def attention_rate(config: GPTConfig) -> float:
    """The dropout rate of attention weights."""
    rate = config.attention_dropout_rate
    return config.dropout_rate if rate is None else rate

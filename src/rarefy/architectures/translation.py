"""The tensors of a decoder under an architecture's names, and back."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from torch import Tensor

from rarefy.architectures.architecture import Architecture
from rarefy.architectures.folding import folded
from rarefy.decoder.decoder_config import GPTConfig
from rarefy.errors import RarefyError


def to_file(architecture: Architecture, config: GPTConfig, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What the architecture's file holds of a decoder.

    Args:
        architecture: without objections to `config`.
        config: of the decoder.
        state: its tensors.

    Returns:
        Contiguous tensors by their names in the file.
    """
    whole = folded(state, config, architecture.embeddings_scale(config))
    named: dict[str, Tensor] = {}
    for row in architecture.rows(config):
        made = row.change.out([whole[name] for name in row.here])
        named.update(zip(row.there, (tensor.contiguous() for tensor in made), strict=True))
    return named


def from_file(
    architecture: Architecture, config: GPTConfig, named: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """A decoder's tensors out of an architecture's file; those that files do not hold are left out.

    Args:
        architecture: of the file.
        config: of the decoder, from `Architecture.as_keys`.
        named: the file's tensors.

    Raises:
        RarefyError: a tensor is missing, or one is there that has no place.
    """
    given = with_prefix(architecture, named)
    rows = list(architecture.rows(config))
    check_names({name for row in rows for name in row.there}, given, architecture)
    state: dict[str, Tensor] = {}
    for row in rows:
        made = row.change.back([given[name] for name in row.there])
        state.update(zip(row.here, made, strict=True))
    # Files hold a tied weight once.
    if config.share_embedding_weights:
        state["lm_head.weight"] = state["embedding_layer.word_embeddings.weight"]
    return state


def with_prefix(architecture: Architecture, named: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors with the prefix that files of a model without its output layer lack."""
    prefix = architecture.layers.split(".")[0] + "."
    if any(name.startswith(prefix) for name in named):
        return dict(named)
    return {name if name.startswith("lm_head") else prefix + name: tensor for name, tensor in named.items()}


def check_names(wanted: Iterable[str], given: Iterable[str], architecture: Architecture) -> None:
    """Whether a file has what is wanted and nothing else that matters.

    Raises:
        RarefyError: the first names that are missing or have no place.
    """
    wanted = set(wanted)
    given = set(given)
    extra = {name for name in given - wanted if not name.endswith((*architecture.ignored, "lm_head.weight"))}
    for names, problem in ((wanted - given, "lacks"), (extra, "has, without a place in the decoder,")):
        if names:
            listed = ", ".join(sorted(names)[:3]) + (", …" if len(names) > 3 else "")
            raise RarefyError(f"the {architecture.model_type} file {problem} {listed}")

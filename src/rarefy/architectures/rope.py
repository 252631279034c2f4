"""Options of rotary positions, in both directions."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from rarefy.architectures.changes import SAME, Change, Halves
from rarefy.decoder.decoder_config import GPTConfig
from rarefy.decoder.rotary import yarn_magnitude
from rarefy.errors import RarefyError

_LLAMA3 = ("low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
_YARN = ("original_max_position_embeddings", "beta_fast", "beta_slow", "truncate")
# Transformers wants all of them written out.
_LLAMA3_DEFAULTS = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


def halves(config: GPTConfig, heads: int) -> Change:
    """How rows of queries or keys become those of a file whose heads turn by halves: as they are, where these do too.

    Example:
        >>> halves(GPTConfig(rotary_pairs="halves"), 2)
        Same()
    """
    return SAME if config.rotary_pairs == "halves" else Halves(heads)


def rope_misfits(config: GPTConfig) -> Iterator[str]:
    """What Transformers does not do with rotary positions, or does otherwise."""
    if config.position_embedding_type != "rotary":
        return
    if config.scaling_type == "longrope":
        yield "pos_scaling_type: longrope"
    if config.scaling_type == "yarn":
        given = config.pos_scaling_extra_args or {}
        if given.get("extrapolation_factor", 1.0) != 1.0:
            yield f"pos_scaling_extra_args.extrapolation_factor: {given['extrapolation_factor']}"


def rope_options(config: GPTConfig) -> dict[str, Any]:
    """`rope_theta` and `rope_scaling` of a decoder without misfits."""
    return {"rope_theta": config.rope_theta, "rope_scaling": _scaling(config)}


def _scaling(config: GPTConfig) -> dict[str, Any] | None:
    factor = config.pos_scaling_factor
    given = dict(config.pos_scaling_extra_args or {})
    if config.scaling_type == "llama3":
        return {"rope_type": "llama3", "factor": factor, **_LLAMA3_DEFAULTS, **given}
    if config.scaling_type == "yarn":
        kept = {key: given[key] for key in _YARN if key in given}
        magnitude = yarn_magnitude(factor, given)
        return {"rope_type": "yarn", "factor": factor, "attention_factor": magnitude, **kept}
    return None if factor == 1.0 else {"rope_type": "linear", "factor": factor}


def rope_keys(options: Mapping[str, Any]) -> dict[str, Any]:
    """The decoder's keys for what a `config.json` says of rotary positions, in its older form or the newer.

    Raises:
        RarefyError: a kind of scaling that the decoder does not have.

    Example:
        >>> rope_keys({"rope_parameters": {"rope_theta": 5e5, "rope_type": "linear", "factor": 2.0}})
        {'rope_theta': 500000.0, 'pos_scaling_type': 'linear', 'pos_scaling_factor': 2.0}
    """
    given = dict(options.get("rope_parameters") or options.get("rope_scaling") or {})
    kind = given.pop("rope_type", None) or given.pop("type", None) or "default"
    # Files of some versions have both names.
    given.pop("type", None)
    theta = given.pop("rope_theta", options.get("rope_theta", 10000.0))
    if given.pop("partial_rotary_factor", 1.0) != 1.0:
        raise _refused("partial_rotary_factor")
    if kind == "default":
        return {"rope_theta": float(theta)}
    factor = given.pop("factor", 1.0)
    keys = {"rope_theta": float(theta), "pos_scaling_type": kind, "pos_scaling_factor": float(factor)}
    if kind == "linear":
        return keys
    if kind == "llama3":
        return keys | {"pos_scaling_extra_args": {key: given[key] for key in _LLAMA3 if key in given}}
    if kind == "yarn":
        return keys | {"pos_scaling_extra_args": _yarn(given, float(factor), options)}
    raise _refused(f"rope_type {kind!r}")


def _yarn(given: dict[str, Any], factor: float, options: Mapping[str, Any]) -> dict[str, Any]:
    if given.get("mscale") or given.get("mscale_all_dim"):
        raise _refused("mscale of yarn")
    found = {key: given[key] for key in _YARN if given.get(key) is not None}
    found.setdefault("original_max_position_embeddings", options["max_position_embeddings"])
    growth = given.get("attention_factor")
    if growth is not None:
        # The decoder says a·ln(factor) + b; the number itself is b alone.
        found |= {"mscale_a": 0.0, "mscale_b": float(growth)}
    return found


def _refused(what: str) -> RarefyError:
    return RarefyError(f"config.json: {what} is not allowed; give rope_type default, linear, llama3 or yarn")

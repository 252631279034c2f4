"""Errors of first masks, said in the words of `prune`: by what its callers have given, and can give."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from rarefy.errors import ConfigError, RarefyError

# `prune` has no option for the layer whose output is summed.
_BY_OUTPUT = ("; name it with output:", "; name the one with output: (example: output: lm_head)")
_OTHER = "; take magnitude, wanda or sparsegpt"


@contextmanager
def in_words_of_prune(method: str) -> Iterator[None]:
    """Says errors of what is inside without the keys of a `sparsity:` block that nobody wrote.

    Args:
        method: that was asked for.

    Raises:
        ConfigError: as inside.
        RarefyError: as inside.

    Example:
        >>> with in_words_of_prune("snip"):
        ...     raise RarefyError("init_method snip: the loss has no gradient")
        Traceback (most recent call last):
        rarefy.errors.RarefyError: snip: the loss has no gradient
    """
    try:
        yield
    except ConfigError as error:
        # The algorithm behind it is none of the caller's.
        allowed = error.allowed.partition(" for static")[0]
        raise ConfigError(error.path, error.given, allowed, error.fix) from None
    except RarefyError as error:
        said = str(error).replace(f"init_method {method}", method)
        for remedy in _BY_OUTPUT:
            said = said.replace(remedy, _OTHER)
        raise RarefyError(said.replace("init_method: topk", "method magnitude")) from error

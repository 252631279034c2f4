"""Of weights that would keep hardly a connection for each output a warning says how to spare them."""

from __future__ import annotations

import fnmatch
import re
import warnings
from collections.abc import Iterable, Mapping
from typing import Protocol

from torch import nn

from rarefy.algorithms.option_checks import highest_number
from rarefy.distributed import is_first
from rarefy.distributions import share_out
from rarefy.filters import Candidate, candidates
from rarefy.patterns import Pattern
from rarefy.schedules import Schedule


class SharesOut(Protocol):
    """What is asked of an algorithm."""

    sparsity: Schedule
    pattern: Pattern
    distribution: str

    @property
    def has_known_shares(self) -> bool:
        """Whether the distribution says what each weight keeps."""
        ...


# A random mask gives some outputs more connections and some fewer: with 4 on average one output of 55 has none (e⁻⁴),
# with 2 one of 7.
ENOUGH = 4
_MOST_NAMED = 3
_MOST_GLOBS = 4


def few_connections(algorithm: SharesOut, chosen: Mapping[str, Candidate]) -> dict[str, str]:
    """The weights that keep fewer than about four connections an output, and how many.

    Args:
        algorithm: that makes them sparse.
        chosen: weights by name.
    """
    shapes = {name: candidate.shape for name, candidate in chosen.items()}
    highest = min(highest_number(algorithm.sparsity), algorithm.pattern.structure.highest_sparsity)
    shares = share_out(algorithm.distribution, highest, shapes)
    # What weights win in a competition is known after it only.
    condition = "" if algorithm.has_known_shares else " if all weights keep the same share"
    # Of drop-and-grow methods alone an output can lose its last connection while others gain.
    loses_outputs = getattr(algorithm, "keep_rows", None) is False
    found = {}
    for name, candidate in chosen.items():
        shape = candidate.shape
        # A filter may name a single number, such as a learned temperature.
        outputs = shape[1 if candidate.axes.transposed else 0] if shape else 1
        kept = algorithm.pattern.on(candidate.axes).kept(shape, shares[name])
        if kept < min(ENOUGH * outputs, shape.numel()):
            advice = (
                " (keep_rows: true keeps one of each output)" if loses_outputs and kept >= outputs else ""
            )
            found[name] = (
                f"{name} {list(shape)} keeps {kept} of {shape.numel()} connections{condition}{advice}"
            )
    return found


def warn_of_few(model: nn.Module, few: Mapping[str, str], chosen: Iterable[str]) -> None:
    """Warns once, of all of them.

    Args:
        model: that becomes sparse.
        few: what to say of each weight.
        chosen: names of all weights that become sparse.
    """
    if not few or not is_first():
        return
    named = list(few.values())[:_MOST_NAMED]
    more = f" and {len(few) - len(named)} more" if len(few) > len(named) else ""
    # The level points at the user's `apply`.
    warnings.warn(
        f"fewer than {ENOUGH} connections an output: {'; '.join(named)}{more}; to leave them dense, "
        f"{_remedy(model, few, chosen)}",
        stacklevel=4,
    )


def _remedy(model: nn.Module, few: Mapping[str, str], chosen: Iterable[str]) -> str:
    others = [name for name in chosen if name not in few]
    # One glob for layers that differ by their number alone.
    globs = list(dict.fromkeys(re.sub(r"(^|\.)\d+(?=\.|$)", r"\1*", name) for name in others))
    matched = [c.name for c in candidates(model) if any(fnmatch.fnmatchcase(c.name, glob) for glob in globs)]
    if others and len(globs) <= _MOST_GLOBS and sorted(matched) == sorted(others):
        return f"give param_filter: {globs if len(globs) > 1 else globs[0]}"
    return "set requires_dense = True on their modules or parameters before apply, or name the others in param_filter"

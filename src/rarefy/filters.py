"""Which parameters become sparse: the default filter, globs, and the reason for every decision."""

from __future__ import annotations

import difflib
import fnmatch
import re
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize

from rarefy.distributed import WHOLE_WEIGHTS, cut_by, is_cut, outside_of_fully_shard
from rarefy.errors import ConfigError, join_path
from rarefy.roles import Axes, Place, axes_of, kind_of, parametrization_problem, why_dense
from rarefy.validation import shorten

# The Model Zoo's default filter leaves these dense.
_DENSE_NAMES = ("embedding", "norm", "lm_head", "pe_helper")
# Adapters are small by design, and are what is trained.
_ADAPTER = re.compile(r"(^|[._])(lora|dora|loha|lokr|hada|oft|boft|vera|ia3|adapters?)([._]|$)")


@dataclass(frozen=True)
class Candidate:
    """One parameter of a model with every place that holds it (several when tied).

    Args:
        name: as in `model.named_parameters()`.
        parameter: the parameter itself.
        places: its modules; the first one belongs to `name`.
        requires_dense: whether the parameter or a module above it asks to stay dense.
    """

    name: str
    parameter: nn.Parameter
    places: tuple[Place, ...]
    requires_dense: bool

    @property
    def axes(self) -> Axes:
        """Which of its dimensions is which."""
        return axes_of(self.places[0], len(self.shape)) if self.places else Axes()

    @property
    def shape(self) -> torch.Size:
        """The shape of the dense weight, however it is stored."""
        return self.parameter.shape


def candidates(model: nn.Module) -> Iterator[Candidate]:
    """Every parameter of `model` once, tied ones together.

    Example:
        >>> [c.name for c in candidates(nn.Linear(2, 2))]
        ['weight', 'bias']
    """
    places: dict[nn.Parameter, list[Place]] = {}
    names: dict[nn.Parameter, str] = {}
    dense: set[nn.Parameter] = set()
    dense_modules = {inner for module in model.modules() if _asks_dense(module) for inner in module.modules()}
    modules = dict(model.named_modules())
    for name, module in modules.items():
        owner, target = _parametrized(name, modules)
        # A module may hold one parameter under two names, each of which is a place of it.
        for leaf, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            names.setdefault(parameter, join_path(name, leaf))
            places.setdefault(parameter, []).append(Place(module, leaf, owner, target))
            if module in dense_modules or _asks_dense(parameter):
                dense.add(parameter)
    for parameter, name in names.items():
        yield Candidate(name, parameter, tuple(places[parameter]), parameter in dense)


def _parametrized(name: str, modules: Mapping[str, nn.Module]) -> tuple[nn.Module | None, str]:
    """The module whose weight the chain of parametrizations of a name computes, and the name of that weight."""
    if not isinstance(modules[name], parametrize.ParametrizationList):
        return None, ""
    above, _, target = name.rpartition(".")
    return modules.get(above.removesuffix("parametrizations").removesuffix(".")), target


def _asks_dense(owner: nn.Module | nn.Parameter) -> bool:
    return bool(getattr(owner, "requires_dense", False))


def default_reason(candidate: Candidate) -> str:
    """Why the default filter leaves a parameter dense; empty when it becomes sparse.

    Example:
        >>> [default_reason(c) for c in candidates(nn.Linear(2, 2))]
        ['', 'fewer than two dimensions']
    """
    if len(candidate.shape) < 2:
        return "fewer than two dimensions"
    word = next((word for word in _DENSE_NAMES if word in candidate.name.lower()), None)
    if word:
        return f"{word} in its name"
    if _ADAPTER.search(candidate.name.lower()):
        return "belongs to an adapter"
    owner = next((place.module for place in candidate.places if _stays_dense(place.module)), None)
    if owner is not None:
        return f"belongs to {kind_of(owner)}"
    # A tied weight that anything looks up or adds is not a matrix alone.
    reasons = (why_dense(place, candidate.shape) for place in candidate.places)
    return next(filter(None, reasons), "")


def _stays_dense(module: nn.Module) -> bool:
    return isinstance(module, nn.Embedding | nn.EmbeddingBag) or "norm" in type(module).__name__.lower()


@dataclass(frozen=True)
class Decision:
    """What a filter says of one parameter.

    Args:
        sparse: whether the parameter becomes sparse.
        reason: the glob that matched, or why the parameter stays dense.
    """

    sparse: bool
    reason: str


def check_filter(param_filter: Any) -> tuple[str, ...] | None:
    """The globs of a filter; None for the default filter.

    Raises:
        ConfigError: neither a glob nor a list of globs.

    Example:
        >>> check_filter("*.weight")
        ('*.weight',)
    """
    if param_filter is None:
        return None
    globs = (param_filter,) if isinstance(param_filter, str) else param_filter
    if isinstance(globs, dict):
        raise ConfigError(
            "param_filter", "a dict of globs", "a glob or a list of globs (dicts go through rarefy.configure)"
        )
    if (
        not isinstance(globs, Sequence)
        or not globs
        or not all(isinstance(glob, str) and glob for glob in globs)
    ):
        raise ConfigError(
            "param_filter", shorten(param_filter), "a glob or a list of globs", 'param_filter: "*.ffn.*"'
        )
    return tuple(globs)


def decide(candidate: Candidate, globs: tuple[str, ...] | None) -> Decision:
    """Whether a parameter becomes sparse, and why.

    Args:
        candidate: the parameter.
        globs: one of them has to match its name; None takes the default filter.

    Example:
        >>> [decide(c, ("w*",)).sparse for c in candidates(nn.Linear(2, 2))]
        [True, False]
    """
    if not candidate.parameter.is_floating_point():
        return Decision(False, "not floating point")
    # Before the globs: what asks to stay dense does so under `*` too.
    if candidate.requires_dense:
        return Decision(False, "requires_dense")
    if globs is None:
        reason = default_reason(candidate)
        return Decision(not reason, reason or f"default filter: {_role(candidate)}")
    # `fnmatch` alone ignores case on some systems.
    match = next((glob for glob in globs if fnmatch.fnmatchcase(candidate.name, glob)), None)
    return Decision(match is not None, match or "no glob matches")


def why_left(candidate: Candidate, filters: Iterable[tuple[str, ...] | None]) -> str:
    """Why none of several filters takes a parameter; empty where there is no filter.

    Args:
        candidate: the parameter.
        filters: globs, or None for the default filter.

    Example:
        >>> [why_left(c, [None, ("x*",)]) for c in candidates(nn.Linear(2, 2))][1]
        'fewer than two dimensions; no glob matches'
    """
    return "; ".join(dict.fromkeys(decide(candidate, globs).reason for globs in filters))


def _role(candidate: Candidate) -> str:
    """What the default filter takes a parameter for."""
    if not candidate.places:
        return "a weight of a saved model"
    place = candidate.places[0]
    return f"weight of a {kind_of(place.owner or place.module)}"


def select(model: nn.Module, globs: tuple[str, ...] | None) -> dict[str, Candidate]:
    """The parameters that become sparse, by name, in the model's order.

    Args:
        model: any module.
        globs: one of them has to match the name of a parameter; None takes the default filter.

    Raises:
        ConfigError: the filter, or one glob of it, matches nothing.

    Example:
        >>> list(select(nn.Linear(2, 2), None))
        ['weight']
    """
    everything = list(candidates(model))
    # All of them, not the chosen ones: a filter cannot judge what has no shape yet.
    for candidate in everything:
        _check_exists(candidate)
    for glob in globs or ():
        # A glob that matches nothing is a slip, even where the others of the list match.
        if not any(fnmatch.fnmatchcase(candidate.name, glob) for candidate in everything):
            _refuse_second_name(model, glob, everything)
            raise ConfigError("param_filter", f"{glob!r} (it matches no parameter)", _near(glob, everything))
    chosen = {c.name: c for c in everything if decide(c, globs).sparse}
    strange = outside_of_fully_shard(model)
    # Where nothing is chosen a cut may be the reason: the pieces that another wrapper leaves have one dimension.
    for candidate in chosen.values() or everything:
        _check_whole(candidate, strange)
    for candidate in chosen.values():
        _check_parametrization(candidate)
    if not chosen:
        what = (
            "the default filter (it matches no parameter)"
            if globs is None
            else f"{', '.join(globs)} (only dense parameters match)"
        )
        raise ConfigError("param_filter", what, _near("weight", everything))
    return chosen


def other_names(model: nn.Module) -> Iterator[tuple[str, str]]:
    """The second, third, ... names of tied weights, each with the first one, which filters go by.

    Example:
        >>> model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
        >>> model[1].weight = model[0].weight
        >>> list(other_names(model))
        [('1.weight', '0.weight')]
    """
    first: dict[nn.Parameter, str] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if first.setdefault(parameter, name) != name:
            yield name, first[parameter]


def matches(name: str, globs: Sequence[str]) -> bool:
    """Whether one of the globs matches a name.

    Args:
        name: of a parameter.
        globs: as `param_filter` takes them; upper and lower case differ on every system.

    Example:
        >>> matches("0.weight", ["*.weight"])
        True
    """
    return any(fnmatch.fnmatchcase(name, glob) for glob in globs)


def _refuse_second_name(model: nn.Module, glob: str, everything: Sequence[Candidate]) -> None:
    for name, first in other_names(model):
        if matches(name, [glob]):
            fix = f"the first name of a tied weight, {first}"
            raise ConfigError(
                "param_filter", f"{glob!r} ({name} is tied to {first})", fix, f"param_filter: {first}"
            )


def refuse_second_names(model: nn.Module, globs: tuple[str, ...] | None, taken: Container[str]) -> None:
    """Refuses globs that match a tied weight by another name than its first one alone: it would stay dense, unsaid.

    Args:
        model: any module.
        globs: of a filter; None for the default filter, which goes by no names of its own.
        taken: the first names of all weights that become sparse.

    Raises:
        ConfigError: there is one, which does not ask to stay dense.

    Example:
        >>> refuse_second_names(nn.Linear(2, 2), ("*",), {"weight"})
    """
    seconds = [both for both in other_names(model) if both[1] not in taken and matches(both[0], globs or ())]
    if not seconds:
        return
    would_be = {one.name for one in candidates(model) if decide(one, ("*",)).sparse}
    for name, first in seconds:
        if first in would_be:
            given = f"{', '.join(globs or ())} ({name} is tied to {first}, which no glob matches)"
            fix = f"globs that match {first} too, to make it sparse, or that leave {name} out"
            raise ConfigError("param_filter", given, fix, f"param_filter: {first}")


def _check_exists(candidate: Candidate) -> None:
    given = f"a model whose {candidate.name} "
    if is_lazy(candidate.parameter):
        raise ConfigError("apply", given + "is lazy", "a model that has seen a batch; call it once before")
    if candidate.parameter.is_meta:
        fix = "a model with weights; call model.to_empty(device=...) and initialise it before"
        raise ConfigError("apply", given + "is on the meta device", fix)


def _check_whole(candidate: Candidate, strange: Container[nn.Module]) -> None:
    module = candidate.places[0].module
    cut = cut_by(candidate.parameter, module)
    if not cut and is_cut(candidate.parameter) and module in strange:
        cut = "a DTensor that fully_shard did not make"
    if cut:
        given = f"a model whose {candidate.name} is {cut}"
        raise ConfigError("apply", given, f"a model that is not cut in this way; {WHOLE_WEIGHTS}")


def _check_parametrization(candidate: Candidate) -> None:
    for place in candidate.places:
        problem = parametrization_problem(place)
        if problem:
            fix = "weights whose zeros stay zeros; remove the parametrization, or leave the weight out"
            raise ConfigError("param_filter", f"{candidate.name} ({problem})", fix)


def _near(glob: str, everything: Sequence[Candidate]) -> str:
    names = [candidate.name for candidate in everything]
    if not names:
        return "a model with parameters"
    near = difflib.get_close_matches(glob.strip("*"), names, n=3, cutoff=0.3) or names[:3]
    return f"a glob that matches; parameters with near names: {', '.join(near)}"

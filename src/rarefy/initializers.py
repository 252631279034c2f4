"""The first mask of a weight: random, topk, from_zeros, checkerboard, or a function of your own."""

from __future__ import annotations

import contextlib
import hashlib
import inspect
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from rarefy import masks
from rarefy.distributed import Cut, is_cut, whole
from rarefy.errors import ConfigError, RarefyError, did_you_mean
from rarefy.patterns import FREE, Pattern, Structure
from rarefy.ties import TieOrder
from rarefy.torch_private import times_written
from rarefy.validation import shorten

_ADVICE = "use init_method: topk"

Initializer = Callable[[Tensor, float, torch.Generator, Structure], Tensor]


def generator_for(seed: int, name: str, update: int) -> torch.Generator:
    """A CPU generator that depends on the seed, the parameter and the update, and on nothing else.

    Args:
        seed: of the algorithm.
        name: of the parameter.
        update: how many updates came before this one; 0 for the first mask.

    Example:
        >>> a, b = (torch.rand(1, generator=generator_for(0, "fc.weight", 3)) for _ in range(2))
        >>> bool(a == b)
        True
    """
    # Python's `hash` of a string differs in every process.
    digest = hashlib.sha256(f"{seed}/{name}/{update}".encode()).digest()
    return torch.Generator("cpu").manual_seed(int.from_bytes(digest[:8], "big") >> 1)


def random_scores(like: Tensor, generator: torch.Generator) -> Tensor:
    """Uniform float32 scores of the shape and device of `like`, the same on every device.

    Args:
        like: a weight of any dtype, whole or a DTensor.
        generator: on the CPU.

    Example:
        >>> random_scores(torch.empty(2, 3, dtype=torch.bfloat16), torch.Generator()).dtype
        torch.float32
    """
    # Never in the weight's dtype: bfloat16 has so few numbers in [0, 1) that most scores would tie.
    scores = torch.rand(like.shape, generator=generator, dtype=torch.float32, device="cpu")
    if is_cut(like):
        # All of them are drawn, so that each place has the score that it has in one process.
        cut = Cut.of(like)
        return cut.wrap(cut.own(scores).contiguous().to(cut.device))
    return scores.to(like.device)


def random(
    weight: Tensor, sparsity: float, generator: torch.Generator, structure: Structure = FREE
) -> Tensor:
    """Active connections drawn at random.

    Args:
        weight: any shape.
        sparsity: fraction of inactive connections, in [0, 1].
        generator: source of randomness, on the CPU.
        structure: what the mask looks like.

    Returns:
        Bool mask of the shape of `weight`.

    Example:
        >>> int(random(torch.ones(10, 10), 0.9, torch.Generator().manual_seed(0)).sum())
        10
    """
    return structure.keep_top(random_scores(weight, generator), sparsity, TieOrder.of(generator))


def topk(weight: Tensor, sparsity: float, generator: torch.Generator, structure: Structure = FREE) -> Tensor:
    """The connections of largest magnitude are active; among equal ones the generator's seed decides.

    Args:
        weight: any shape.
        sparsity: fraction of inactive connections, in [0, 1].
        generator: its seed decides among equal ones.
        structure: what the mask looks like.

    Example:
        >>> topk(torch.tensor([1.0, -3.0, 2.0, 0.5]), 0.5, torch.Generator()).tolist()
        [False, True, True, False]
    """
    return structure.keep_top(weight.abs(), sparsity, TieOrder.of(generator))


def from_zeros(
    weight: Tensor, sparsity: float, generator: torch.Generator, structure: Structure = FREE
) -> Tensor:
    """What is exactly zero already is inactive.

    Args:
        weight: any shape.
        sparsity: what the structure is checked at, where it fixes how many are active; the mask is the same at any.
        generator: plays no part.
        structure: what the mask has to look like.

    Raises:
        RarefyError: the weight is zero everywhere, or its zeros are not of the structure.

    Example:
        >>> from_zeros(torch.tensor([1.0, 0.0]), 0.9, torch.Generator()).tolist()
        [True, False]
    """
    if weight.numel() and not weight.any():
        raise RarefyError(
            "init_method from_zeros found a weight that is zero everywhere, which would leave it without a connection; "
            f"{_ADVICE} or leave the weight out of param_filter"
        )
    mask = structure.unfold(structure.fold_mask(weight != 0), weight.shape)
    return structure.require(mask, sparsity, "init_method from_zeros", _ADVICE)


def checkerboard(
    weight: Tensor, sparsity: float, generator: torch.Generator, structure: Structure = FREE
) -> Tensor:
    """Active connections spread evenly: number i of n is active when ⌊(i+1)·kept/n⌋ > ⌊i·kept/n⌋.

    Args:
        weight: any shape; its values play no part.
        sparsity: fraction of inactive connections, in [0, 1].
        generator: plays no part.
        structure: what the mask looks like.

    Example:
        >>> checkerboard(torch.ones(2, 4), 0.5, torch.Generator()).int().tolist()
        [[0, 1, 0, 1], [0, 1, 0, 1]]
    """
    rows, units = structure.layout(weight.shape)
    # In whole numbers: as float32, places above 2^24 would be rounded.
    total = rows * units
    kept = rows * masks.kept_count(units, sparsity)
    position = torch.arange(total, device=weight.device)
    active = (position + 1) * kept // max(total, 1) > position * kept // max(total, 1)
    mask = structure.unfold(active.view(rows, units), weight.shape)
    # Spread within its rows, a mask may still have more in a column than the structure allows.
    is_even = int(mask.count_nonzero()) == structure.kept(weight.shape, sparsity)
    fits = is_even and structure.holds(mask, sparsity)
    return mask if fits else structure.keep_top(mask.float(), sparsity)


INITIALIZERS: dict[str, Initializer] = {
    "random": random,
    "topk": topk,
    "from_zeros": from_zeros,
    "checkerboard": checkerboard,
}


def first_mask(
    initializer: Initializer, weight: Tensor, sparsity: float, generator: torch.Generator, pattern: Pattern
) -> Tensor:
    """The first mask of a weight, each balanced group by itself.

    Args:
        initializer: of `INITIALIZERS`, or one's own.
        weight: whole, or a DTensor; it is gathered for initializers that do not rank each connection by itself.
        sparsity: of each group.
        generator: source of randomness.
        pattern: what the mask obeys.

    Returns:
        Bool, whole, or a DTensor like the weight.

    Example:
        >>> first_mask(topk, torch.tensor([3.0, 1.0]), 0.5, torch.Generator(), Pattern())
        tensor([ True, False])
    """
    takes_pieces = pattern.axis is None and pattern.structure == FREE and initializer in (random, topk)
    pieces = pattern.split(weight if takes_pieces else whole(weight))
    return pattern.merge([initializer(piece, sparsity, generator, pattern.structure) for piece in pieces])


def parse_initializer(value: Any) -> Initializer:
    """The initializer of a name, or a user's function `(weight, sparsity) -> mask`.

    Raises:
        ConfigError: an unknown name, or something that is no function.

    Example:
        >>> parse_initializer("topk") is topk
        True
    """
    if callable(value):
        # One of this file's passed as a function still knows structures,
        # of which `_checked` tells a user's nothing.
        return next((known for known in INITIALIZERS.values() if known is value), None) or _checked(value)
    if isinstance(value, str) and value.lower() in INITIALIZERS:
        return INITIALIZERS[value.lower()]
    hint = did_you_mean(str(value), INITIALIZERS)
    raise ConfigError("init_method", shorten(value), f"a known method ({hint})", "init_method: topk")


def _checked(function: Callable[..., Any]) -> Initializer:
    """A user's function that may leave out the generator, with its answer checked."""
    takes_generator = _required_arguments(function) > 2

    def initialize(
        weight: Tensor, sparsity: float, generator: torch.Generator, structure: Structure = FREE
    ) -> Tensor:
        mask = function(weight, sparsity, generator) if takes_generator else function(weight, sparsity)
        source = f"init_method {getattr(function, '__name__', function)}"
        return structure.require(check_mask(mask, weight, source), sparsity, source, _ADVICE)

    return initialize


def _required_arguments(function: Callable[..., Any]) -> int:
    """How many positional arguments a function must be given; 0 for built-in ones, which do not tell."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except ValueError:
        return 0
    positional = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    return sum(parameter.default is parameter.empty for parameter in positional)


# ---- what a user's code returned for a weight, here and in an update, and what it was to leave alone ----


def check_mask(mask: Any, weight: Tensor, source: str) -> Tensor:
    """A mask that came from a user's code, checked against its weight.

    Args:
        mask: what the code returned.
        weight: that it belongs to.
        source: what returned it, for the message.

    Returns:
        The mask, on the device of the weight.

    Raises:
        RarefyError: it is no bool tensor of the weight's shape.

    Example:
        >>> check_mask(torch.tensor([True]), torch.zeros(1), "my function").tolist()
        [True]
    """
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool or mask.shape != weight.shape:
        got = f"{mask.dtype} {list(mask.shape)}" if isinstance(mask, Tensor) else type(mask).__name__
        raise RarefyError(f"{source} returned {got}; return a bool tensor of shape {list(weight.shape)}")
    # Users build masks on the CPU, wherever the weight is.
    return mask.to(weight.device)


def check_scores(scores: Any, like: Tensor, source: str) -> Tensor:
    """Scores that came from a user's code: one number for each connection.

    Args:
        scores: what the code returned.
        like: the weight, or the part of the gradient, that they are of.
        source: what returned them, for the message.

    Raises:
        RarefyError: they are no numbers that can be ranked, or of another shape.

    Example:
        >>> check_scores(torch.tensor([1.0]), torch.zeros(1), "my grow_score").tolist()
        [1.0]
    """
    is_ranked = isinstance(scores, Tensor) and scores.dtype != torch.bool and not scores.is_complex()
    if not is_ranked or scores.shape != like.shape:
        got = f"{scores.dtype} {list(scores.shape)}" if isinstance(scores, Tensor) else type(scores).__name__
        raise RarefyError(
            f"{source} returned {got}; return a tensor of real numbers of shape {list(like.shape)}, one for each "
            "connection (scores.expand_as(weight) repeats rows or columns)"
        )
    return scores


def refuse_empty(name: str, mask: Tensor, step: int, sparsity: float) -> None:
    """Refuses a topology without any connection: nothing would pass through the layer, or be learned before it.

    Args:
        name: of the weight.
        mask: bool, that it is about to get.
        step: of the update.
        sparsity: the target.

    Raises:
        RarefyError: no connection is active.
    """
    if mask.numel() and masks.active_count(mask) == 0:
        raise RarefyError(
            f"{name} would have no connection left at step {step} (target sparsity {sparsity:g}); give a sparsity that "
            "stays below 1, a mask with connections, or a param_filter without this weight"
        )


@contextlib.contextmanager
def left_alone(source: str, name: str, **shown: Tensor | None) -> Iterator[None]:
    """Refuses what a user's code wrote to what it was shown: of some storages that is the weight itself, or a copy.

    Args:
        source: what is called, for the message.
        name: of the parameter.
        **shown: what it is given.

    Raises:
        RarefyError: one of them was written to in place.

    Example:
        >>> with left_alone("my update_mask", "fc.weight", weight=torch.zeros(1)):
        ...     pass
    """
    before = {key: (one, times_written(one)) for key, one in shown.items() if one is not None}
    yield
    for key, (one, written) in before.items():
        if times_written(one) != written:
            raise RarefyError(
                f"{source} changed the {key} of {name} in place; work on a copy of it ({key}.clone()), or with "
                "operations that make a new tensor (abs in place of abs_)"
            )

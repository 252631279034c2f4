"""What has to be known of an optimizer: how it treats zeros, and which numbers of its state belong to connections.

These are told by what they mean, not by shape alone. A preconditioner of a square layer has the shape of the weight
too. It is told apart by what the same entry looks like for weights that are not square, by its name, or by a step of
the same optimizer on a tiny weight.
"""

from __future__ import annotations

import contextlib
import re
import warnings
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn, optim
from torch.optim import Optimizer

Path = tuple[Any, ...]

# What has one entry a connection; steps, Adafactor's rows and columns and LBFGS's history have not.
_OF_TORCH: dict[type[Optimizer], frozenset[str]] = {
    optim.SGD: frozenset({"momentum_buffer"}),
    optim.Adam: frozenset({"exp_avg", "exp_avg_sq", "max_exp_avg_sq"}),
    optim.NAdam: frozenset({"exp_avg", "exp_avg_sq"}),
    optim.RAdam: frozenset({"exp_avg", "exp_avg_sq"}),
    optim.Adamax: frozenset({"exp_avg", "exp_inf"}),
    optim.SparseAdam: frozenset({"exp_avg", "exp_avg_sq"}),
    optim.RMSprop: frozenset({"square_avg", "momentum_buffer", "grad_avg"}),
    optim.Adagrad: frozenset({"sum"}),
    optim.Adadelta: frozenset({"square_avg", "acc_delta"}),
    optim.Rprop: frozenset({"prev", "step_size"}),
    optim.ASGD: frozenset({"ax"}),
    optim.Adafactor: frozenset({"variance"}),
    optim.LBFGS: frozenset(),
}
_MOMENT = re.compile(
    r"^((max_)?exp_avg\w*|exp_inf|\w*momentum\w*|(grad|square|sum)_?avg|sum|prev|previous_grad|velocity|moment\w*|m|v|z"
    r"|slow\w*|state[12]|ax|acc_delta|step_size|ema\w*)$"
)
_MATRIX = re.compile(
    r"precond|shampoo|kron|statistic|stats|gram|cov|eig|inv|factor|root|basis|^gg$|^[lqru](_?[lr])?\d*$",
    re.IGNORECASE,
)
_ROTATION = re.compile(r"^(gg|q|q_?[lr]|eigen\w*|basis\w*)$", re.IGNORECASE)

# Not Adamax, whose exp_inf never falls below eps, and not Rprop, whose step sizes do not rest at zero.
_ZERO_STAYS_ZERO = (
    optim.SGD,
    optim.Adam,
    optim.AdamW,
    optim.NAdam,
    optim.RAdam,
    optim.RMSprop,
    optim.Adagrad,
    optim.Adadelta,
)


def entries(state: Any, path: Path = ()) -> Iterator[tuple[Path, Tensor]]:
    """Every tensor of a nested state, and the keys that lead to it.

    Example:
        >>> [path for path, _ in entries({"m": torch.ones(2), "pair": [torch.ones(1), 3]})]
        [('m',), ('pair', 0)]
    """
    if isinstance(state, Tensor):
        yield path, state
    elif isinstance(state, dict):
        for key, value in state.items():
            yield from entries(value, (*path, key))
    elif isinstance(state, list | tuple):
        for index, value in enumerate(state):
            yield from entries(value, (*path, index))


def belongs_to_connections(optimizer: Optimizer, weight: nn.Parameter, path: Path, shape: torch.Size) -> bool:
    """Whether a tensor of a weight's shape has one entry for each connection.

    Args:
        optimizer: whose state it is in.
        weight: that the state is kept for.
        path: keys that lead to the tensor.
        shape: of the tensor, and of the weight.

    Example:
        >>> weight = nn.Parameter(torch.ones(2, 2)); optimizer = optim.Adam([weight])
        >>> belongs_to_connections(optimizer, weight, ("exp_avg",), weight.shape)
        True
    """
    known = next((keys for kind, keys in _OF_TORCH.items() if isinstance(optimizer, kind)), None)
    name = str(next((key for key in reversed(path) if isinstance(key, str)), ""))
    if known is not None and (name in known or isinstance(optimizer, optim.Adafactor | optim.LBFGS)):
        return name in known
    if "sq" in name and any(_ROTATION.match(str(key)) for key in optimizer.state.get(weight, {})):
        # Second moments in a rotated basis, as SOAP keeps them.
        return False
    if len(shape) != 2 or shape[0] != shape[1]:
        return True
    for decide in (_by_other_weights, _by_name, _by_trial):
        decision = decide(optimizer, path, name)
        if decision is not None:
            return decision
    warnings.warn(
        f"{type(optimizer).__name__} keeps {name!r} in the shape of a square weight, and it cannot be told whether "
        "that is one number a connection; it is left as it is when connections are dropped",
        stacklevel=2,
    )
    return False


def _by_other_weights(optimizer: Optimizer, path: Path, name: str) -> bool | None:
    """What the same entry looks like for weights that are not square."""
    for weight, state in optimizer.state.items():
        if not isinstance(weight, Tensor) or weight.dim() != 2 or weight.shape[0] == weight.shape[1]:
            continue
        for other, tensor in entries(state):
            if other == path:
                return tensor.shape == weight.shape
    return None


def _by_name(optimizer: Optimizer, path: Path, name: str) -> bool | None:
    keys = [str(key) for key in path if isinstance(key, str)]
    if any(_MATRIX.search(key) for key in keys):
        return False
    return True if _MOMENT.match(name) else None


def _by_trial(optimizer: Optimizer, path: Path, name: str) -> bool | None:
    """Two steps of an optimizer of the same class and options on a tiny weight that is not square."""
    weight = nn.Parameter(torch.ones(3, 5, device="cpu"))
    options = {key: value for key, value in optimizer.param_groups[0].items() if key != "params"}
    # Anything may go wrong in somebody else's constructor; then nothing is known.
    with contextlib.suppress(Exception), torch.random.fork_rng(devices=[]), torch.enable_grad():
        build: Any = type(optimizer)
        trial = build([{"params": [weight], **options}])
        for scale in (1.0, 2.0):
            weight.grad = torch.linspace(-1, 1, 15, device="cpu").view(3, 5) * scale
            trial.step()
        for other, tensor in entries(trial.state[weight]):
            if other == path:
                return tensor.shape == weight.shape
    return None


def preserves_zeros(optimizer: optim.Optimizer) -> bool:
    """Whether a connection with zero weight, gradient and state stays so without help.

    True for torch's element-wise optimizers only; for all others (Adafactor, Muon, one's own) an algorithm restores the
    zeros after the step.

    Example:
        >>> weights = [nn.Parameter(nn.Linear(2, 2).weight)]
        >>> preserves_zeros(optim.AdamW(weights)), preserves_zeros(optim.Adafactor(weights))
        (True, False)
    """
    # Without eps a zero moment divides by zero.
    return is_element_wise(optimizer) and all(group.get("eps", 1.0) > 0 for group in optimizer.param_groups)


def is_element_wise(optimizer: optim.Optimizer) -> bool:
    """Whether an optimizer is known to treat every position of a weight by itself, whatever the weight's shape.

    Example:
        >>> is_element_wise(optim.Adafactor([nn.Parameter(nn.Linear(2, 2).weight)]))
        False
    """
    # The very class: a subclass may do anything.
    return type(optimizer) in _ZERO_STAYS_ZERO


def trained_parameters(optimizer: optim.Optimizer) -> dict[nn.Parameter, None]:
    """The parameters in an optimizer's groups: a set that keeps their order.

    Example:
        >>> layer = nn.Linear(2, 2)
        >>> layer.bias in trained_parameters(optim.SGD([layer.weight], lr=0.1))
        False
    """
    return dict.fromkeys(parameter for group in optimizer.param_groups for parameter in group["params"])


def with_inner(optimizers: Iterable[optim.Optimizer]) -> list[optim.Optimizer]:
    """The optimizers and those that they wrap, in whichever attribute: SAM, Lookahead, ZeRO and their kin.

    Example:
        >>> inner = optim.SGD([nn.Parameter(nn.Linear(2, 2).weight)], lr=0.1)
        >>> outer = optim.SGD(inner.param_groups[0]["params"], lr=0.1); outer.base = inner
        >>> with_inner([outer]) == [outer, inner]
        True
    """
    found: list[optim.Optimizer] = []
    waiting = list(optimizers)
    while waiting:
        optimizer = waiting.pop(0)
        if any(optimizer is other for other in found):
            continue
        found.append(optimizer)
        waiting += [inner for inner in vars(optimizer).values() if isinstance(inner, optim.Optimizer)]
    return found


def rest_value(optimizer: optim.Optimizer, weight: nn.Parameter, path: Sequence[Any]) -> float:
    """What an optimizer begins with in a state of one number a connection.

    Args:
        optimizer: of torch's classes or one of the same kind by its name.
        weight: whose state it is.
        path: keys that lead to the tensor.

    Example:
        >>> weight = nn.Parameter(nn.Linear(2, 2).weight)
        >>> rest_value(optim.Rprop([weight], lr=0.5), weight, ("step_size",))
        0.5
    """
    kind = type(optimizer).__name__.lower()
    options = {"step_size": "lr"} if "rprop" in kind else {"sum": "initial_accumulator_value"}
    option = options.get(str(path[-1]) if path else "")
    if option is None:
        return 0.0
    groups = (group for group in optimizer.param_groups if any(weight is other for other in group["params"]))
    return float(next(groups, {}).get(option, 0.0))

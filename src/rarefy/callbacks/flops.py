"""Operations of a forward pass, counted while it runs, and of a training so far beside those of its dense twin."""

from __future__ import annotations

import contextlib
import copy
import logging
import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from rarefy.algorithms.base import SparsityAlgorithm
from rarefy.callbacks.trainer_view import TrainerView
from rarefy.distributed import ranks
from rarefy.models.call import count
from rarefy.saliency.objective import Objective, called
from rarefy.storage.training_cost import PER_POSITION, PRODUCTS, Cost, step_operations, used_by
from rarefy.torch_private import compiles_its_calls, viewed

log = logging.getLogger("rarefy")

Counted = tuple[Tensor | None, int]

Shapes = tuple[Any, ...]
MOST_FORMS = 256
# Of a compiled model, for which each form takes a forward pass more.
MOST_FORMS_APART = 32


class ForwardFlops(TorchFunctionMode):
    """While it is entered, adds up floating-point operations; never disturbs what it watches.

    Two operations a multiplication, as usual. Linear layers, convolutions, matrix products and attention are
    counted, element-wise work is not.

    Args:
        model: whose parameters are told apart.

    Attributes:
        by_parameter: operations by parameter name, as if every weight were dense.
        in_training: the same with the backward pass: gradients of weights, and of inputs that want one.
        other: operations between activations.

    Example:
        >>> model = nn.Linear(8, 4)
        >>> with ForwardFlops(model) as flops:
        ...     _ = model(torch.ones(2, 8))
        >>> dict(flops.by_parameter)
        {'weight': 128}
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self._names = {parameter: name for name, parameter in model.named_parameters()}
        self.by_parameter: Counter[str] = Counter()
        self.in_training: Counter[str] = Counter()
        self.other = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Calls the function, then counts what it did."""
        # Called first: an error of the model's comes out as it is, and nothing was counted for it.
        result = func(*args, **(kwargs or {}))
        counted = _count(func, args, kwargs or {}, result)
        products = 1 + _gradients_of(args, kwargs or {}) if counted else 0
        for weight, operations in counted:
            # Many models multiply with a weight transposed, or with one expert of a stack.
            owner = None if weight is None else viewed(weight)
            name = self._names.get(owner) if isinstance(owner, nn.Parameter) else None
            if name is None:
                self.other += operations
            else:
                self.by_parameter[name] += operations
                self.in_training[name] += operations * products
        return result


@contextlib.contextmanager
def watched(model: nn.Module, batch: Any) -> Iterator[ForwardFlops]:
    """Counts the operations of the forward pass of a batch, which is made inside; a compiled model makes one more.

    Args:
        model: that computes.
        batch: that it is about to compute with.
    """
    if is_compiled(model):
        yield counted_apart(model, batch)
        return
    with ForwardFlops(model) as flops:
        yield flops


def with_unseen(counted: Mapping[str, int], sizes: Mapping[str, int], batch: Any) -> dict[str, int]:
    """Operations by weight; a weight that computes in a way of its own counts as a linear layer.

    A table of embeddings is looked up, and multiplies nothing.

    Args:
        counted: what was seen, by name of the weight.
        sizes: of all sparse weights, by name.
        batch: that was computed with.

    Example:
        >>> with_unseen({}, {"experts": 10}, torch.ones(3, 2))
        {'experts': 60}
    """
    samples, tokens = count(batch)
    unseen = {name: 2 * size * (tokens or samples) for name, size in sizes.items() if name not in counted}
    return {**counted, **unseen}


def counted_apart(model: nn.Module, batch: Any) -> ForwardFlops:
    """Counts the operations of a compiled model, which a mode that watches it would make compile twice.

    Its forward pass is run once more for it, with a copy of the batch: not compiled, without gradients, and with
    attributes of modules, buffers and random numbers as before afterwards.

    Args:
        model: that `torch.compile` has to do with.
        batch: as the Trainer calls the model with it.

    Raises:
        Exception: whatever the model raises.

    Example:
        >>> flops = counted_apart(torch.compile(nn.Linear(8, 4), backend="eager"), torch.ones(2, 8))
        >>> dict(flops.by_parameter)
        {'_orig_mod.weight': 128}
    """
    flops = ForwardFlops(model)
    # A model may take its batch apart, or write to it.
    own = copy.deepcopy(batch)
    with torch.no_grad(), torch.compiler.set_stance("force_eager"), _attributes_kept(model), flops:
        Objective(model).run({}, own, called)
    return flops


@contextlib.contextmanager
def _attributes_kept(model: nn.Module) -> Iterator[None]:
    """Puts attributes of modules back, such as the length for which a table was made that is a buffer."""
    kept = [(vars(module), dict(vars(module))) for module in model.modules()]
    try:
        yield
    finally:
        for now, before in kept:
            for name in now.keys() - before.keys():
                del now[name]
            now.update(before)


def is_compiled(model: nn.Module) -> bool:
    """Whether `torch.compile` has to do with a model; watching it would make it compile twice."""
    kinds = (type(module).__name__ for module in model.modules())
    return compiles_its_calls(model) or "OptimizedModule" in kinds


def _count(func: Any, args: Any, kwargs: Mapping[str, Any], result: Any) -> list[Counted]:
    rule = _RULES.get(func)
    if rule is None:
        return []
    try:
        return rule(result, *args, **kwargs)
    # Called in a way that no rule expects: not counted, rather than disturbed.
    except (TypeError, AttributeError, IndexError):
        return []


def _gradients_of(args: Sequence[Any], kwargs: Mapping[str, Any]) -> int:
    """How many products a backward pass makes for one of the forward pass: of inputs and of weights that want one."""
    if not torch.is_grad_enabled():
        return PRODUCTS - 1
    wanted = [one for one in (*args, *kwargs.values()) if isinstance(one, Tensor) and one.requires_grad]
    are_weights = {isinstance(viewed(one), nn.Parameter) for one in wanted}
    return len(are_weights)


def _linear(_: Tensor, input: Tensor, weight: Tensor, *__: Any, **___: Any) -> list[Counted]:
    return [(weight, 2 * math.prod(input.shape[:-1]) * weight.numel())]


def _convolution(result: Tensor, input: Tensor, weight: Tensor, *_: Any, **__: Any) -> list[Counted]:
    return [(weight, 2 * result.numel() * math.prod(weight.shape[1:]))]


def _transposed(_: Tensor, input: Tensor, weight: Tensor, *__: Any, **___: Any) -> list[Counted]:
    # Of a transposed convolution each input position meets the whole kernel, not each output position.
    return [(weight, 2 * input.numel() * math.prod(weight.shape[1:]))]


def _product(result: Tensor, left: Tensor, right: Tensor, *_: Any, **__: Any) -> list[Counted]:
    weight = right if isinstance(viewed(right), nn.Parameter) else left
    return [(weight, 2 * result.numel() * left.shape[-1])]


def _added_product(
    result: Tensor, _: Tensor, left: Tensor, right: Tensor, *__: Any, **___: Any
) -> list[Counted]:
    return _product(result, left, right)


def _attention(result: Tensor, query: Tensor, key: Tensor, *_: Any, **__: Any) -> list[Counted]:
    # Causal attention counts whole: which scores a kernel skips is its own affair.
    scores = math.prod(query.shape[:-1]) * key.shape[-2]
    return [(None, 2 * scores * (query.shape[-1] + result.shape[-1]))]


def _lookup(_: Tensor, __: Tensor, weight: Tensor, *___: Any, **____: Any) -> list[Counted]:
    return [(weight, 0)]


def _multi_head(
    result: Any, query: Tensor, key: Tensor, value: Tensor, width: int, heads: int, *rest: Any, **_: Any
) -> list[Counted]:
    """One call of torch's multi-head attention; `rest` begins with in_proj weight and bias."""
    positions = query.numel() // width
    source = key.shape[0]
    # The projections of queries, keys and values in one, and that of the output.
    weights = [one for one in (rest[0], rest[6]) if one is not None]
    return [
        *((weight, 2 * positions * weight.numel()) for weight in weights),
        (None, 4 * positions * source * width),
    ]


# Within a function that the mode has seen it is off, so what that calls is not counted again.
_RULES: Mapping[Any, Callable[..., list[Counted]]] = {
    F.linear: _linear,
    **dict.fromkeys((F.conv1d, F.conv2d, F.conv3d), _convolution),
    **dict.fromkeys((F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d), _transposed),
    # To torch the function, the method and the operator are three.
    **dict.fromkeys((torch.matmul, Tensor.matmul, Tensor.__matmul__), _product),
    **dict.fromkeys((torch.mm, Tensor.mm, torch.bmm, Tensor.bmm), _product),
    **dict.fromkeys((torch.addmm, torch.baddbmm), _added_product),
    **dict.fromkeys((F.embedding, F.embedding_bag), _lookup),
    F.scaled_dot_product_attention: _attention,
    F.multi_head_attention_forward: _multi_head,
}


@dataclass(frozen=True)
class ForwardPass:
    """What one forward pass over a batch of one form takes, every weight dense.

    Args:
        weights: operations by name of the weight.
        other: operations between activations.
    """

    weights: Mapping[str, int]
    other: int


class TrainingFlops:
    """Adds up what each training step needs; backward passes count twice the forward pass.

    sparse = Σ over weights of forward · (used + used + active) / size, where active is all positions in steps that
    collect the dense gradient, + two operations a position at each update; products between activations as in the
    dense twin.

    A forward pass is watched once for each form of its batch; that of a compiled model is run once more for it, which
    is given up where a model fails in it, where its batches have many forms, and where several processes train it. The
    connections are counted after updates only.

    Attributes:
        total: of all processes, since the beginning of the run; None where nothing can be counted.
    """

    def __init__(self) -> None:
        self.total: Cost | None = None
        self._passes: dict[Shapes, ForwardPass] = {}
        self._connections: dict[str, tuple[int, int, int]] = {}
        self._watching = ExitStack()
        self._flops: ForwardFlops | None = None
        self._is_apart = False

    def begin(self, trainer: TrainerView) -> None:
        """Begins with a model, whose connections may be others than at the last step that was seen."""
        self.close()
        self._passes = {}
        self._connections = {}
        self._is_apart = is_compiled(trainer.model)
        # A run that goes on has its total from the checkpoint.
        if trainer.global_step == 0:
            self.total = Cost()
        # Layers may wait for those of other processes, whose batches need not be of a new form as well. A dense run
        # logs none in any case.
        if self._is_apart and ranks() > 1 and trainer.sparsity is not None:
            self._give_up("several processes train it")

    def before_forward(self, trainer: TrainerView, batch: Any) -> None:
        """Watches a forward pass over a batch of a form that was not seen yet."""
        if self.total is None or not trainer.model.training or _shapes(batch) in self._passes:
            return
        if self._is_apart:
            self._flops = self._apart(trainer.model, batch)
        else:
            self._flops = self._watching.enter_context(ForwardFlops(trainer.model))

    def _apart(self, model: nn.Module, batch: Any) -> ForwardFlops | None:
        if len(self._passes) >= MOST_FORMS_APART:
            self._give_up(f"its batches have more than {MOST_FORMS_APART} forms")
            return None
        try:
            return counted_apart(model, batch)
        # The run itself must not fail for it, whatever a model raises when it is called in another way.
        except Exception as error:
            reason = " ".join(str(error).split())
            self._give_up(f"without it a forward pass fails ({type(error).__name__}: {reason})")
            return None

    def _give_up(self, reason: str) -> None:
        self.total = None
        log.warning(
            "flops/sparse and flops/dense are not logged: the model is under torch.compile, and %s; "
            "rarefy.summary(sparsity) has the share of a step",
            reason,
        )

    def after_forward(
        self, trainer: TrainerView, algorithms: Sequence[SparsityAlgorithm], batch: Any
    ) -> None:
        """Counts a forward pass and the backward pass that follows."""
        if self._flops is not None:
            flops = self._flops
            self.close()
            shapes = {name: one.shape for leaf in algorithms for name, one in leaf.parameters.items()}
            # Biases and gains are element-wise work.
            sizes = {name: shape.numel() for name, shape in shapes.items() if len(shape) > 1}
            weights = with_unseen(flops.by_parameter, sizes, batch)
            # Texts of any length would fill the memory with forms that never come again.
            if len(self._passes) >= MOST_FORMS:
                self._passes.clear()
            self._passes[_shapes(batch)] = ForwardPass(weights, flops.other)
        if self.total is not None and trainer.model.training:
            self.total += self._cost(self._passes[_shapes(batch)], algorithms)

    def updated(self, name: str, size: int) -> None:
        """Counts the update of a weight, whose connections are others now."""
        self._connections.pop(name, None)
        if self.total is not None:
            self.total += Cost(PER_POSITION * size * ranks(), 0)

    def close(self) -> None:
        """Stops watching; a forward pass that failed has left it on."""
        self._watching.close()
        self._flops = None

    def saved(self) -> dict[str, int] | None:
        """For a checkpoint."""
        return None if self.total is None else {"sparse": self.total.sparse, "dense": self.total.dense}

    def load(self, saved: Mapping[str, int] | None) -> None:
        """Goes on from what `saved` returned; a checkpoint without it has not counted what came before."""
        self.total = None if saved is None else Cost(saved["sparse"], saved["dense"])

    def _cost(self, one: ForwardPass, algorithms: Sequence[SparsityAlgorithm]) -> Cost:
        dense = PRODUCTS * (sum(one.weights.values()) + one.other)
        saved = 0
        for leaf in algorithms:
            # The gradient of every position then, which costs as much as a dense weight's.
            is_collected = collects_dense_gradient(leaf)
            for name in leaf.parameters:
                size, used, active = self._counted(leaf, name)
                forward = one.weights.get(name, 0)
                needed = step_operations(forward, size, used, size if is_collected else active)
                saved += PRODUCTS * forward - needed
        return Cost((dense - saved) * ranks(), dense * ranks())

    def _counted(self, leaf: SparsityAlgorithm, name: str) -> tuple[int, int, int]:
        """Positions, connections that forward passes use, and active ones."""
        if name not in self._connections:
            parameter = leaf.parameters[name]
            self._connections[name] = (parameter.shape.numel(), used_by(parameter), parameter.active)
        return self._connections[name]


def collects_dense_gradient(algorithm: SparsityAlgorithm) -> bool:
    """Whether the step in progress collects the dense gradient.

    Args:
        algorithm: applied to a model.
    """
    is_update = not algorithm.autoupdate or algorithm.update_schedule(algorithm.step + 1)
    return algorithm.needs == "dense" and is_update


def _shapes(batch: Any) -> Shapes:
    """The form of a batch: the shapes of its tensors, in order."""
    if isinstance(batch, Tensor):
        return tuple(batch.shape)
    parts = batch.values() if isinstance(batch, Mapping) else batch if isinstance(batch, list | tuple) else ()
    return tuple(_shapes(part) for part in parts)

"""`compact`: each weight of a sparse model in the form that multiplies fastest on this machine."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from io import StringIO
from typing import TYPE_CHECKING, Literal, get_args

import torch
from torch import Tensor, nn

from rarefy.algorithms.attachment.keeper import finalize
from rarefy.algorithms.summary import html_table, in_short, one_line
from rarefy.cost.rule import rule
from rarefy.errors import RarefyError
from rarefy.filters import Candidate, candidates
from rarefy.inference.blocks_of_zeros import Block, block_of
from rarefy.inference.trial import speed_up
from rarefy.nn import is_conv1d
from rarefy.nn.inference_only import InferenceOnly
from rarefy.storage.choice import obstacle
from rarefy.tensors import Role, SparseWeight, become

if TYPE_CHECKING:
    from rich.table import Table

Form = Literal["dense", "compact", "block"]
COLUMNS = ("parameter", "shape", "sparsity", "form", "why")
FEWEST_ZEROS = 0.3  # share of zeros below which no kernel was ever seen to win
_GAIN = 1.05  # what a weight has to gain before it is turned
_TRIED = 8  # weights of one kind that a trial takes


@dataclass(frozen=True)
class CompactedLayer:
    """What became of one weight.

    Args:
        name: as in `model.named_parameters()`.
        shape: of the weight.
        sparsity: share of its zeros.
        form: `compact` (connections), `block` (whole blocks of them) or `dense`.
        reason: why.
    """

    name: str
    shape: tuple[int, ...]
    sparsity: float
    form: Form
    reason: str


@dataclass(frozen=True)
class Compacted:
    """What `compact` chose; prints as a table.

    Args:
        layers: the weights that have zeros, in the model's order.
    """

    layers: tuple[CompactedLayer, ...]

    def __repr__(self) -> str:
        counts = Counter(layer.form for layer in self.layers)
        return one_line("Compacted", {form: counts[form] for form in get_args(Form)[::-1]})

    def __rich__(self) -> Table:
        from rich.table import Table
        from rich.text import Text

        table = Table(*COLUMNS)
        for line in self._lines():
            table.add_row(*map(Text, line))
        return table

    def _repr_html_(self) -> str:
        return html_table(COLUMNS, self._lines())

    def __str__(self) -> str:
        from rich.console import Console

        text = StringIO()
        Console(file=text, width=150).print(self)
        return text.getvalue()

    def _lines(self) -> Iterator[tuple[str, ...]]:
        """One line for weights that differ in the number of their layer only."""
        alike: dict[tuple[str, ...], list[str]] = {}
        for layer in self.layers:
            shape = " × ".join(map(str, layer.shape))
            facts = (shape, f"{layer.sparsity:.2f}", layer.form, layer.reason)
            alike.setdefault(facts, []).append(layer.name)
        for facts, names in alike.items():
            for name in in_short(names):
                yield (name, *facts)


@torch.no_grad()
def compact(model: nn.Module, *, tokens: int = 1, form: Literal["auto", "compact"] = "auto") -> Compacted:
    """Turns a sparse model into its fastest form for inference on this machine.

    A weight with zeros keeps only its connections where that is faster, or its blocks, if it consists of whole ones:
    y = x · Wᵀ + b without the products that are zero. Weights of one kind are tried in each form for a moment, with
    `tokens` rows. Outputs stay what they are up to
    rounding, files and copies hold what they did. The model goes to evaluation mode and cannot be trained until
    `rarefy.finalize(model)` takes everything back; algorithms let go of it, as with `finalize`.

    Args:
        model: sparse, finalized, or loaded from a file with zeros in its weights; changed in place.
        tokens: rows of activations in one call, ≥ 1: 1 for `generate()` at batch 1, batch · length for an encoder.
        form: `auto` decides by the trial; `compact` turns every weight that can be.

    Returns:
        What each weight with zeros became, and why; `print` it for a table.

    Raises:
        RarefyError: `tokens` or `form` is something else.

    Example:
        >>> import rarefy
        >>> layer = nn.Linear(64, 64)
        >>> rarefy.configure(0.9).apply(layer)
        >>> [(one.name, one.form) for one in compact(layer, form="compact").layers]
        [('weight', 'compact')]
    """
    _check(tokens, form)
    model = finalize(model).eval()
    found = {one.name: one for one in candidates(model) if len(one.shape) > 1 and _zeros(one) >= FEWEST_ZEROS}
    reasons = {name: _obstacle(one) for name, one in found.items()}
    free = [one for name, one in found.items() if not reasons[name]]
    forms: dict[str, Form] = dict.fromkeys(found, "dense")
    turned: dict[str, SparseWeight] = {}
    for block, alike in _of_one_kind(free):
        chosen, reason = _decide(alike, block, tokens, form)
        for one in alike:
            forms[one.name] = chosen
            reasons[one.name] = reason
            if chosen != "dense":
                turned[one.name] = _sparse(one, block if chosen == "block" else None)
    layers = tuple(_layer(one, forms[name], reasons[name]) for name, one in found.items())
    wanted = [one.name for one in found.values() if one.parameter.requires_grad]
    for name, sparse in turned.items():
        become(found[name].parameter, sparse)
    if found:
        InferenceOnly(wanted).mark(model)
    return Compacted(layers)


def _check(tokens: int, form: str) -> None:
    if isinstance(tokens, bool) or not isinstance(tokens, int) or tokens < 1:
        raise RarefyError(f"tokens: {tokens!r} is not allowed; give a whole number ≥ 1 (example: tokens=1)")
    if form not in ("auto", "compact"):
        raise RarefyError(f"form: {form!r} is not allowed; give 'auto' or 'compact'")


def _zeros(candidate: Candidate) -> float:
    weight = candidate.parameter
    if not weight.is_floating_point() or not weight.numel() or weight.is_meta:
        return 0.0
    return 1 - int(weight.count_nonzero()) / weight.numel()


def _obstacle(candidate: Candidate) -> str:
    """Why a weight has to stay dense; empty where it need not."""
    dtype = candidate.parameter.dtype
    no_kernel = "" if rule(dtype) else f"there is no kernel for {str(dtype).removeprefix('torch.')} here"
    return obstacle(candidate.places) or no_kernel


def _of_one_kind(free: Sequence[Candidate]) -> list[tuple[Block | None, list[Candidate]]]:
    """Weights of one shape, dtype, layout, block and about one sparsity are tried together."""
    kinds: dict[tuple[object, ...], tuple[Block | None, list[Candidate]]] = {}
    for one in free:
        weight = one.parameter
        is_transposed = is_conv1d(one.places[0].module)
        block = block_of(weight.t() != 0 if is_transposed else weight != 0)
        # Sparsity to the nearest twentieth.
        kind = (weight.shape, weight.dtype, is_transposed, block, round(_zeros(one) * 20))
        kinds.setdefault(kind, (block, []))[1].append(one)
    return list(kinds.values())


def _decide(alike: Sequence[Candidate], block: Block | None, tokens: int, form: str) -> tuple[Form, str]:
    """The form of weights of one kind, and why."""
    sparse_forms: dict[Form, Block | None] = {"block": block, "compact": None} if block else {"compact": None}
    if form == "compact":
        return ("block" if block else "compact"), "asked for"
    some = alike[:_TRIED]
    dense: list[Tensor] = [one.parameter.detach() for one in some]
    ratios: dict[Form, float] = {
        name: speed_up(dense, [_sparse(one, size) for one in some], tokens)
        for name, size in sparse_forms.items()
    }
    best = max(ratios, key=ratios.__getitem__)
    rows = "1 token" if tokens == 1 else f"{tokens} tokens"
    if ratios[best] >= _GAIN:
        return best, f"{ratios[best]:.1f} times faster with {rows}"
    return "dense", f"{best} would be {ratios[best]:.1f} times as fast with {rows}"


def _sparse(candidate: Candidate, block: Block | None) -> SparseWeight:
    weight = candidate.parameter.detach()
    is_transposed = is_conv1d(candidate.places[0].module)
    return SparseWeight.from_dense(weight, weight != 0, Role.FREE, is_transposed, block)


def _layer(candidate: Candidate, form: Form, reason: str) -> CompactedLayer:
    return CompactedLayer(candidate.name, tuple(candidate.shape), _zeros(candidate), form, reason)

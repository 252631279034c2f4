"""A table of what is sparse (parameter, shape, target, actual, storage) and why, as text and in a notebook."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from io import StringIO
from typing import TYPE_CHECKING, Any, Protocol, cast

from rarefy.errors import RarefyError
from rarefy.filters import Candidate, candidates, decide, why_left
from rarefy.schedules import Constant
from rarefy.storage.training_cost import Cost, Memory, memory_of, operations_of

if TYPE_CHECKING:
    from rich.console import RenderableType

MOST_NAMED = 6
# A number that is a part of a name by itself: the 12 of `layers.12.weight`, not the 1 of `conv1.weight`.
LAYER_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)|^\d+(?=\.)")
COLUMNS = ("parameter", "algorithm", "shape", "target", "actual", "kept", "pattern", "storage")


class HasAlgorithms(Protocol):
    """An algorithm or a group."""

    @property
    def algorithms(self) -> list[Any]:
        """The algorithms that it is made of."""
        ...


@dataclass(frozen=True)
class SummaryRow:
    """One sparse parameter.

    Args:
        name: as in `model.named_parameters()`.
        algorithm: name of the algorithm that rules it.
        shape: of the weight.
        target: sparsity that was asked for at the latest update.
        actual: sparsity measured from the mask.
        kept: active connections, counted in the mask.
        pattern: balance and pattern of its masks.
        storage: `masked` or `compact`.
        reason: the glob that took it, or what the default filter took it for.
    """

    name: str
    algorithm: str
    shape: tuple[int, ...]
    target: float
    actual: float
    kept: int
    pattern: str
    storage: str
    reason: str = ""


@dataclass(frozen=True)
class Summary:
    """The sparse parameters of a model; prints as a table, with a line for each reason below it.

    Args:
        rows: one a sparse parameter.
        dense: why each of the other parameters stayed dense, by name.
        operations: floating-point operations of a training step on the sparse weights, a row of activations.
        at_updates: the same in a step that collects the dense gradient; no more where none does.
        memory: of all weights, gradients and states of the optimizers that are followed.
    """

    rows: tuple[SummaryRow, ...]
    dense: Mapping[str, str] = field(default_factory=dict)
    operations: Cost = field(default_factory=Cost)
    at_updates: Cost = field(default_factory=Cost)
    memory: Memory = field(default_factory=Memory)

    @property
    def actual_sparsity(self) -> float:
        """The measured sparsity of all sparse parameters together."""
        sizes = [math.prod(row.shape) for row in self.rows]
        inactive = sum(row.actual * size for row, size in zip(self.rows, sizes, strict=True))
        return inactive / sum(sizes) if sum(sizes) else 0.0

    def __repr__(self) -> str:
        return one_line("Summary", {"weights": len(self.rows), "actual": f"{self.actual_sparsity:.4f}"})

    def __rich__(self) -> RenderableType:
        # Here, as rich takes longer to import than the rest of this room.
        from rich.console import Group
        from rich.table import Table
        from rich.text import Text

        table = Table(*COLUMNS)
        for row in self._lines():
            table.add_row(*map(Text, row))
        table.add_section()
        table.add_row(*self._total())
        return Group(table, *map(Text, [*self.costs(), *self.reasons()]))

    def _repr_html_(self) -> str:
        table = html_table(COLUMNS, [*self._lines(), self._total()])
        lines = [*self.costs(), *self.reasons()]
        return table + "".join(f"<div>{_escaped(line)}</div>" for line in lines)

    def costs(self) -> list[str]:
        """What training needs against dense: operations, and memory between two steps."""
        if not self.operations.dense:
            return []
        line = f"training FLOPs of sparse weights: {_share(self.operations)} of dense"
        if self.at_updates != self.operations:
            line += f", {_share(self.at_updates)} in steps that collect the dense gradient"
        total = self.memory.total
        kept = f"{total.sparse:,} of {total.dense:,} bytes"
        return [line, f"weights, gradients and optimizer states: {kept}, {_share(total)} of dense"]

    def reasons(self) -> list[str]:
        """Why each parameter was taken or left, those that share a reason in one line."""
        taken = {row.name: row.reason for row in self.rows if row.reason}
        return [*_by_reason("sparse", taken), *_by_reason("dense", self.dense)]

    def _lines(self) -> Iterator[tuple[str, ...]]:
        for row in self.rows:
            facts = " × ".join(map(str, row.shape)), f"{row.target:.4f}", f"{row.actual:.4f}", f"{row.kept:,}"
            yield row.name, row.algorithm, *facts, row.pattern, row.storage

    def _total(self) -> tuple[str, ...]:
        total = sum(math.prod(row.shape) for row in self.rows)
        kept = sum(row.kept for row in self.rows)
        return "all", "", f"{total:,} weights", "", f"{self.actual_sparsity:.4f}", f"{kept:,}", "", ""

    def __str__(self) -> str:
        from rich.console import Console

        text = StringIO()
        # Without a terminal rich takes 80 columns, too few for this table.
        Console(file=text, width=150).print(self)
        return text.getvalue()


class Shown:
    """How an algorithm or a group shows itself: in a line, and as its summary in a notebook."""

    def __repr__(self) -> str:
        leaves: list[Any] = getattr(self, "algorithms", [])
        if leaves != [self]:
            return f"{type(self).__name__}({', '.join(map(repr, leaves))})"
        schedule = leaves[0].sparsity
        sparsity = f"{schedule.value:g}" if isinstance(schedule, Constant) else schedule
        facts: dict[str, object] = {"sparsity": sparsity, "not applied": None}
        if leaves[0].parameters:
            actual = summary(leaves[0]).actual_sparsity
            facts = {"sparsity": sparsity, "weights": len(leaves[0].parameters), "actual": f"{actual:.4f}"}
            facts["step"] = leaves[0].step
        return one_line(type(self).__name__, facts)

    def _repr_html_(self) -> str:
        found = summary(cast(HasAlgorithms, self))
        return found._repr_html_() if found.rows else f"<code>{_escaped(repr(self))}</code>"


def summary(sparsity: HasAlgorithms) -> Summary:
    """What is sparse by now, per parameter.

    Args:
        sparsity: an algorithm or a group that was applied to a model.

    Returns:
        Rows, totals, and why each parameter is sparse or dense; `print` it for a table.

    Raises:
        RarefyError: it is something else, such as the model.

    Example:
        >>> import rarefy, torch
        >>> model = torch.nn.Linear(8, 8)
        >>> sparsity = rarefy.configure(0.75)
        >>> sparsity.apply(model)
        >>> summary(sparsity).actual_sparsity, summary(sparsity).dense
        (0.75, {'bias': 'fewer than two dimensions'})
    """
    if not hasattr(sparsity, "algorithms"):
        raise RarefyError(
            f"summary: a {type(sparsity).__name__} is not allowed; give what was applied to the model, as "
            "rarefy.configure returned it"
        )
    algorithms = sparsity.algorithms
    found = _candidates(algorithms)
    rows = tuple(_rows(algorithms, found))
    sparse = {row.name for row in rows}
    filters = [algorithm.globs for algorithm in algorithms]
    dense = {name: why_left(one, filters) for name, one in found.items() if name not in sparse}
    return Summary(rows, dense, *_costs(algorithms))


def _costs(algorithms: Iterable[Any]) -> tuple[Cost, Cost, Memory]:
    """Operations of a training step, of one that collects dense gradients, and the memory between two."""
    usual = Cost()
    at_updates = Cost()
    memory = Memory()
    # Each once: the members of a group share model and optimizer.
    models = dict.fromkeys(model for one in algorithms for model in one.models())
    optimizers = dict.fromkeys(optimizer for one in algorithms for optimizer in one.optimizers)
    parameters = [parameter for one in algorithms for parameter in one.parameters.values()]
    for one in algorithms:
        usual += operations_of(one.parameters.values())
        at_updates += operations_of(one.parameters.values(), one.needs == "dense")
    for model in models:
        memory += memory_of(model, optimizers, parameters)
    return usual, at_updates, memory


def _share(cost: Cost) -> str:
    return f"{100 * cost.sparse / max(cost.dense, 1):.1f}%"


def _candidates(algorithms: Iterable[Any]) -> dict[str, Candidate]:
    """Every parameter of the models that the algorithms were applied to."""
    models = dict.fromkeys(model for algorithm in algorithms for model in algorithm.models())
    return {candidate.name: candidate for model in models for candidate in candidates(model)}


def _rows(algorithms: Iterable[Any], found: Mapping[str, Candidate]) -> Iterable[SummaryRow]:
    for algorithm in algorithms:
        kind = algorithm.label
        pattern = str(algorithm.pattern)
        targets = algorithm.shares(algorithm.target_sparsity)
        for name, parameter in algorithm.parameters.items():
            shape = tuple(parameter.shape)
            actual = parameter.actual_sparsity
            kept = round((1.0 - actual) * math.prod(shape))
            reason = decide(found[name], algorithm.globs).reason if name in found else ""
            storage = parameter.storage.form
            yield SummaryRow(name, kind, shape, targets[name], actual, kept, pattern, storage, reason)


def _by_reason(word: str, reasons: Mapping[str, str]) -> Iterator[str]:
    """One line a reason: `dense, fewer than two dimensions: 0.bias, 2.bias`."""
    kinds: dict[str, list[str]] = {}
    for name, reason in reasons.items():
        kinds.setdefault(reason, []).append(name)
    for reason, names in kinds.items():
        shown = in_short(names)
        more = f" and {len(shown) - MOST_NAMED} more" if len(shown) > MOST_NAMED else ""
        yield f"{word}, {reason}: {', '.join(shown[:MOST_NAMED])}{more}"


def in_short(names: Sequence[str]) -> list[str]:
    """Names, with a glob and a count for those of more than two layers.

    Example:
        >>> in_short(["0.weight", "1.weight", "2.weight", "head.weight"])
        ['*.weight (3)', 'head.weight']
    """
    alike: dict[str, list[str]] = {}
    for name in names:
        alike.setdefault(LAYER_NUMBER.sub("*", name), []).append(name)
    shown = ([f"{glob} ({len(some)})"] if len(some) > 2 else some for glob, some in alike.items())
    return [text for some in shown for text in some]


def one_line(kind: str, facts: Mapping[str, object]) -> str:
    """A short `repr`; a fact of None stands alone.

    Example:
        >>> one_line("RigL", {"sparsity": 0.9, "not applied": None})
        'RigL(sparsity=0.9, not applied)'
    """
    shown = [name if value is None else f"{name}={value}" for name, value in facts.items()]
    return f"{kind}({', '.join(shown)})"


def html_table(columns: Sequence[str], rows: Iterable[Sequence[str]], caption: str = "") -> str:
    """A table for `_repr_html_`; whatever stands in it is text.

    Example:
        >>> html_table(["name"], [["<b>"]])
        '<table><thead><tr><th>name</th></tr></thead><tbody><tr><td>&lt;b&gt;</td></tr></tbody></table>'
    """
    title = f"<caption>{_escaped(caption)}</caption>" if caption else ""
    head = f"<thead><tr>{_cells(columns, 'th')}</tr></thead>" if any(columns) else ""
    body = "".join(f"<tr>{_cells(row, 'td')}</tr>" for row in rows)
    return f"<table>{title}{head}<tbody>{body}</tbody></table>"


def _cells(texts: Iterable[str], tag: str) -> str:
    return "".join(f"<{tag}>{_escaped(text)}</{tag}>" for text in texts)


def _escaped(text: str) -> str:
    # Imported late: the module brings a table of all named characters, and few programs show HTML.
    from html import escape

    return escape(text)

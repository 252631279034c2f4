"""What the adapters log."""

from __future__ import annotations

from rarefy.algorithms.base import Sparsifier
from rarefy.callbacks.log_sparsity import actual_of, targets_of


def sparsity_metrics(sparsity: Sparsifier, every_parameter: bool) -> dict[str, float]:
    """Target sparsity of each algorithm and measured sparsity of the model, by the names that `LogSparsity` uses.

    Args:
        sparsity: applied to a model.
        every_parameter: whether the measured sparsity of each parameter is wanted too.

    Example:
        >>> import rarefy, torch
        >>> sparsity = rarefy.configure(0.75)
        >>> sparsity.apply(torch.nn.Linear(8, 8))
        >>> sparsity_metrics(sparsity, every_parameter=False)
        {'sparsity/*/target': 0.75, 'sparsity/model/actual': 0.75}
    """
    leaves = [leaf for leaf in sparsity.algorithms if leaf.parameters]
    actual = actual_of({name: one for leaf in leaves for name, one in leaf.parameters.items()})
    overall = "sparsity/model/actual"
    return {**targets_of(leaves), **(actual if every_parameter else {overall: actual[overall]})}

"""Algorithms whose optimizer trains another form of the weights."""

from __future__ import annotations

from torch import Tensor

from rarefy.algorithms.view import is_replaced


class Reparametrizing:
    """The form of the weights that optimizers train; a subclass writes all three methods, or none.

    The model has the weights themselves at all times but within `optimizer.step()`. Each method is given one entry a
    connection, in any order, and treats entries one by one; zero must be zero in both forms.
    """

    @property
    def reparametrizes(self) -> bool:
        """Whether optimizers train another form than the weights."""
        return is_replaced(self, Reparametrizing, "trained_form")

    def trained_form(self, weight: Tensor) -> Tensor:
        """What an optimizer trains in the place of the weight. Here: the weight.

        Args:
            weight: not to be changed.
        """
        return weight

    def weight_of(self, trained: Tensor) -> Tensor:
        """The weight whose trained form this is: the reverse of `trained_form`.

        Args:
            trained: not to be changed.
        """
        return trained

    def slope(self, trained: Tensor) -> Tensor:
        """The derivative of `weight_of`, by which the gradient of the weight is multiplied for the optimizer.

        Args:
            trained: not to be changed.
        """
        return trained.new_ones(()).expand_as(trained)

"""An algorithm of one's own: used by custom_algorithm.yaml, or `DropSmallSaliency(0.9).apply(model)`."""

from torch import Tensor

from rarefy.algorithms.drop_and_grow import DropAndGrow


class DropSmallSaliency(DropAndGrow):
    """Drops where |weight · gradient| is smallest, grows where the dense gradient is largest."""

    name = "drop_small_saliency"
    needs_dense_grad = True

    def drop_score(self, weight: Tensor, dense_grad: Tensor | None) -> Tensor:
        """What the loss would change by, to first order, without this connection."""
        return weight.abs() if dense_grad is None else (weight * dense_grad).abs()

    def grow_score(self, weight: Tensor, dense_grad: Tensor | None) -> Tensor:
        """The size of the dense gradient, as in RigL."""
        return weight.abs() if dense_grad is None else dense_grad.abs()

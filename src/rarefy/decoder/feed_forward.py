"""The feed-forward part of a decoder layer, plain or gated."""

from __future__ import annotations

from torch import Tensor, nn

from rarefy.decoder.activations import GATES, activation


class DenseLayer(nn.Module):
    """A linear layer and, where given, a nonlinearity; gated ones have a second linear layer.

    plain: f(W x + b); gated: (W x + b) · f(V x + c), where V is `linear_layer_for_glu`.

    Args:
        inputs: size of the input.
        outputs: size of the output.
        bias: whether the linear layers have biases.
        nonlinearity: a name of `NONLINEARITIES`, or None.

    Example:
        >>> [name for name, _ in DenseLayer(2, 3, False, "swiglu").named_parameters()]
        ['linear_layer.weight', 'linear_layer_for_glu.weight']

    Reference:
        Shazeer, GLU Variants Improve Transformer, arXiv 2002.05202.
    """

    def __init__(self, inputs: int, outputs: int, bias: bool, nonlinearity: str | None = None) -> None:
        super().__init__()
        self.linear_layer = nn.Linear(inputs, outputs, bias=bias)
        self.linear_layer_for_glu = nn.Linear(inputs, outputs, bias=bias) if nonlinearity in GATES else None
        self.activation = nn.Identity() if nonlinearity is None else activation(nonlinearity)

    def forward(self, hidden: Tensor) -> Tensor:
        """[..., inputs] to [..., outputs]."""
        if self.linear_layer_for_glu is None:
            return self.activation(self.linear_layer(hidden))
        return self.linear_layer(hidden) * self.activation(self.linear_layer_for_glu(hidden))


class FeedForward(nn.Module):
    """A wide layer with the nonlinearity, then one back to the hidden size.

    Args:
        hidden_size: size of input and output.
        filter_size: size in between.
        bias: whether the linear layers have biases.
        nonlinearity: a name of `NONLINEARITIES`.
    """

    def __init__(self, hidden_size: int, filter_size: int, bias: bool, nonlinearity: str) -> None:
        super().__init__()
        wide = DenseLayer(hidden_size, filter_size, bias, nonlinearity)
        self.ffn = nn.Sequential(wide, DenseLayer(filter_size, hidden_size, bias))

    def forward(self, hidden: Tensor) -> Tensor:
        """[batch, sequence, hidden] to the same shape."""
        return self.ffn(hidden)

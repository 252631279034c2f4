"""A mixture of experts: a router sends each token to a few of several feed-forward parts."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from rarefy.decoder.decoder_config import GPTConfig, MoEConfig
from rarefy.decoder.feed_forward import GATES, FeedForward, activation


@dataclass(frozen=True)
class Routing:
    """Where one layer sent the tokens of a batch.

    Args:
        probabilities: of each expert [batch, sequence, experts], as the router sees them.
        chosen: 1 where an expert gets the token, else 0; same shape.
        weights: what the experts' outputs are multiplied by; same shape.
    """

    probabilities: Tensor
    chosen: Tensor
    weights: Tensor


class Experts(nn.Module):
    """A router and its experts, in place of a feed-forward part.

    Args:
        config: of a model with `moe`.

    Reference:
        Shazeer et al., arXiv 1701.06538; Jiang et al., Mixtral of Experts, arXiv 2401.04088.
    """

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.moe = config.moe
        count = config.moe.num_experts
        self.gate = nn.Linear(config.hidden_size, count, bias=bool(config.moe.router_use_bias))
        self.experts = _LAYOUTS.get(config.moe.moe_implementation, FunctionalExperts)(config)

    def forward(self, hidden: Tensor, input_ids: Tensor) -> tuple[Tensor, Routing]:
        """[batch, sequence, hidden] to the same shape, and where the tokens went."""
        routing = self._route(hidden, input_ids)
        tokens = hidden.flatten(0, 1)
        weights = routing.weights.to(hidden.dtype).flatten(0, 1)
        output = torch.zeros_like(tokens)
        for index in range(self.moe.num_experts):
            output = self._add(output, tokens, weights[:, index], index)
        for index in range(self.moe.num_experts, self.moe.num_experts + (self.moe.num_shared_experts or 0)):
            output = output + self.experts.run(index, tokens)
        return output.view_as(hidden), routing

    def _add(self, output: Tensor, tokens: Tensor, weights: Tensor, index: int) -> Tensor:
        """`output` with one expert's part; it computes its own tokens only where their number may be looked at."""
        if tokens.is_meta or torch.compiler.is_compiling() or torch.jit.is_tracing():
            return output + self._weighted(index, tokens, weights)
        # Weights of 0 are experts that the router did not choose.
        chosen = weights.nonzero().squeeze(1)
        # Under autocast an expert answers in bfloat16, and `index_add` takes one dtype only.
        part = self._weighted(index, tokens[chosen], weights[chosen])
        return output.index_add(0, chosen, part.to(output.dtype))

    def _weighted(self, index: int, tokens: Tensor, weights: Tensor) -> Tensor:
        weights = weights.unsqueeze(1)
        if self.moe.probability_before_ffn:
            # Tokens of other experts are zeros here, and biases would still answer.
            return self.experts.run(index, tokens * weights) * (weights != 0)
        return self.experts.run(index, tokens) * weights

    def _route(self, hidden: Tensor, input_ids: Tensor) -> Routing:
        if self.moe.routing_algorithm == "hash":
            chosen = functional.one_hot(input_ids.long() % self.moe.num_experts, self.moe.num_experts).float()
            return Routing(chosen, chosen, chosen)
        if self.moe.routing_algorithm == "uniform":
            chosen = uniform_choice(hidden.shape[1], self.moe).to(hidden.device).expand(len(hidden), -1, -1)
            return Routing(chosen / self.moe.top_k, chosen, chosen / self.moe.top_k)
        logits = self.gate(hidden)
        return choose(at_least_float32(logits) if self.moe.router_fp32 else logits, self.moe)


def choose(logits: Tensor, moe: MoEConfig) -> Routing:
    """The most probable experts of each token, their weights adding up to 1 unless the config says otherwise.

    Args:
        logits: of the router [batch, sequence, experts].
        moe: how many, and how they are weighted; a `null_expert_bias` takes part of the weight.

    Example:
        >>> choose(torch.tensor([[[0.0, 2.0, 1.0]]]), MoEConfig(num_experts=3, top_k=2)).chosen
        tensor([[[0., 1., 1.]]])
    """
    probabilities = _weigh(logits, moe.router_selection_nonlinearity)
    best = probabilities.topk(moe.top_k, dim=-1).indices
    # No gradient through the choice itself: the router learns by the weights alone.
    chosen = torch.zeros_like(probabilities).scatter(-1, best, 1.0)
    weights = _weigh(logits, moe.expert_weighting_nonlinearity) * chosen
    if moe.expert_weighting_normalization:
        weights = weights / (weights.sum(-1, keepdim=True) + (moe.null_expert_bias or 0.0))
    return Routing(at_least_float32(probabilities), at_least_float32(chosen), weights)


def uniform_choice(length: int, moe: MoEConfig) -> Tensor:
    """The experts of each position in turn, [sequence, experts].

    Example:
        >>> uniform_choice(3, MoEConfig(num_experts=2)).tolist()
        [[1.0, 0.0], [0.0, 1.0], [1.0, 0.0]]
    """
    experts = (torch.arange(length).unsqueeze(1) + torch.arange(moe.top_k)) % moe.num_experts
    return functional.one_hot(experts, moe.num_experts).sum(1).float()


def balance_loss(routings: list[Routing], mask: Tensor) -> Tensor:
    """How unevenly the experts are used: experts² · mean(share of the tokens · mean probability), 1 · k when even.

    Args:
        routings: of every layer.
        mask: which tokens count [batch, sequence].

    Returns:
        A scalar, float32; shares and probabilities are means over the layers first.

    Reference:
        Fedus et al., Switch Transformers, arXiv 2101.03961.
    """
    # A sequence of padding alone has nothing to divide by.
    counts = mask.sum(1).clamp(min=1).unsqueeze(1)
    chosen = torch.stack([one.chosen for one in routings]).mean(0)
    probabilities = torch.stack([one.probabilities for one in routings]).mean(0)
    shares = (chosen * mask.unsqueeze(2)).sum(1) / counts
    means = (probabilities * mask.unsqueeze(2)).sum(1) / counts
    return chosen.shape[2] ** 2 * (shares * means).mean()


def at_least_float32(tensor: Tensor) -> Tensor:
    """Narrower numbers as float32; float64 stays."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def _weigh(logits: Tensor, kind: str | None) -> Tensor:
    return logits.sigmoid() if kind == "sigmoid" else logits.softmax(-1)


class SeparateExperts(nn.Module):
    """Experts as layers of their own: `experts.{i}.{0,1}`, and shared ones beside them."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        arguments = (config.hidden_size, config.filter_size, config.use_ffn_bias, config.nonlinearity)
        self.experts = nn.ModuleList(
            nn.ModuleList(FeedForward(*arguments).ffn) for _ in range(config.moe.num_experts)
        )
        shared = config.moe.num_shared_experts or 0
        self.shared_experts = nn.ModuleList(FeedForward(*arguments) for _ in range(shared))

    def run(self, index: int, tokens: Tensor) -> Tensor:
        """Expert `index` of tokens [count, hidden]; shared ones come after the others."""
        if index >= len(self.experts):
            return self.shared_experts[index - len(self.experts)](tokens)
        for layer in self._layers(index):
            tokens = layer(tokens)
        return tokens

    def _layers(self, index: int) -> Iterator[nn.Module]:
        layers = self.experts[index]
        assert isinstance(layers, nn.ModuleList)
        yield from layers


class FunctionalExperts(nn.Module):
    """Experts as feed-forward parts: `experts.{i}.ffn.{0,1}`."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        arguments = (config.hidden_size, config.filter_size, config.use_ffn_bias, config.nonlinearity)
        count = config.moe.num_experts + (config.moe.num_shared_experts or 0)
        self.experts = nn.ModuleList(FeedForward(*arguments) for _ in range(count))

    def run(self, index: int, tokens: Tensor) -> Tensor:
        """Expert `index` of tokens [count, hidden]."""
        return self.experts[index](tokens)


class FusedExperts(nn.Module):
    """All experts' weights in one tensor [outputs, experts, inputs] a layer: `fused_ffns.{0,1}`."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        narrow = config.hidden_size
        wide = config.filter_size
        count = config.moe.num_experts + (config.moe.num_shared_experts or 0)
        layer = FusedDenseLayer(count, narrow, wide, config.use_ffn_bias, config.nonlinearity)
        self.fused_ffns = nn.ModuleList([layer, FusedDenseLayer(count, wide, narrow, config.use_ffn_bias)])

    def run(self, index: int, tokens: Tensor) -> Tensor:
        """Expert `index` of tokens [count, hidden]."""
        for layer in self.fused_ffns:
            tokens = layer(index, tokens)
        return tokens


class FusedDenseLayer(nn.Module):
    """`DenseLayer` for every expert at once.

    Args:
        count: of the experts.
        inputs: size of the input.
        outputs: size of the output.
        bias: whether the linear layers have biases.
        nonlinearity: a name of `NONLINEARITIES`, or None.
    """

    def __init__(
        self, count: int, inputs: int, outputs: int, bias: bool, nonlinearity: str | None = None
    ) -> None:
        super().__init__()
        gated = nonlinearity in GATES
        self.linear_layer = FusedLinear(count, inputs, outputs, bias)
        self.linear_layer_for_glu = FusedLinear(count, inputs, outputs, bias) if gated else None
        self.activation = nn.Identity() if nonlinearity is None else activation(nonlinearity)

    def forward(self, index: int, tokens: Tensor) -> Tensor:
        """Expert `index`: [count, inputs] to [count, outputs]."""
        hidden = self.linear_layer(index, tokens)
        if self.linear_layer_for_glu is None:
            return self.activation(hidden)
        return hidden * self.activation(self.linear_layer_for_glu(index, tokens))


class FusedLinear(nn.Module):
    """The linear layers of all experts; weights [outputs, experts, inputs], biases [outputs, experts, 1]."""

    def __init__(self, count: int, inputs: int, outputs: int, bias: bool) -> None:
        super().__init__()
        self.expert_weights = nn.Parameter(torch.zeros(outputs, count, inputs))
        self.expert_biases = nn.Parameter(torch.zeros(outputs, count, 1)) if bias else None

    def forward(self, index: int, tokens: Tensor) -> Tensor:
        """Expert `index`: [count, inputs] to [count, outputs]."""
        bias = None if self.expert_biases is None else self.expert_biases[:, index, 0]
        return functional.linear(tokens, self.expert_weights[:, index], bias)


_LAYOUTS = {"experimental": SeparateExperts, "optimized": FusedExperts}

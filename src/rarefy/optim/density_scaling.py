"""SµPar: weights and learning rates that follow the density of a sparse weight."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from rarefy.distributed import whole
from rarefy.errors import ConfigError
from rarefy.validation import shorten

PARAMETRIZATIONS = ("standard", "supar")
DENSITY_KEY = "density"
_OPTION = "parametrization"


class DensityScaling:
    """Scales weights, once, and checks that an optimizer scales their learning rates.

    SµPar: σ² = σ²_base / ρ and η = η_base / ρ for a weight of density ρ. A unit then adds up ρ·n products with the
    spread of n dense ones, and a step of Adam moves it as far as a dense one.

    Args:
        name: of the parametrization: `supar`, as `standard` scales nothing.
        is_constant: whether the sparsity stays the same at every step.
        is_measured: whether first masks are measured on data, which weights scaled by their density would change.

    Attributes:
        densities: ρ of each scaled weight by name, in (0, 1]; None before any was scaled.

    Raises:
        ConfigError: an unknown name, a sparsity that changes, or first masks that are measured.

    Reference:
        Dey et al., Sparse maximal update parameterization, arXiv:2405.15743.

    Example:
        >>> weight = torch.ones(2, 2)
        >>> DensityScaling("supar").scale({"weight": weight}, {"weight": torch.eye(2) > 0})
        >>> round(weight[0, 0].item(), 4)
        1.4142
    """

    def __init__(self, name: object, *, is_constant: bool = True, is_measured: bool = False) -> None:
        if name != "supar":
            raise ConfigError(_OPTION, shorten(name), "standard or supar", "parametrization: supar")
        self.densities: dict[str, float] | None = None
        if not is_constant:
            self._refuse("a sparsity that changes", "a number, as weights are scaled once", "sparsity: 0.9")
        if is_measured:
            self._refuse("an init_method that is measured on data", "init_method: random, or leave it out")

    def check_start(self, *, is_first_step: bool, restricts_forward: bool) -> None:
        """Refuses an algorithm whose weights do not have from the start the density that forward passes see.

        Args:
            is_first_step: whether step 0 is an update step.
            restricts_forward: whether forward passes may use fewer connections than are active.

        Raises:
            ConfigError: it is such a one.
        """
        if not is_first_step:
            self._refuse(
                "an update schedule that leaves out step 0", "update.start: 0", "update: {freq: 100}"
            )
        if restricts_forward:
            what = "an algorithm whose forward passes use fewer connections than are active"
            self._refuse(what, "one without, such as rigl, or leave it out")

    def check_weight(self, name: str, modules: Iterable[nn.Module]) -> None:
        """Refuses a weight whose rows are looked up, for which a density says nothing about activations.

        Raises:
            ConfigError: it is an embedding's.
        """
        if any(isinstance(module, nn.Embedding | nn.EmbeddingBag) for module in modules):
            self._refuse(f"{name}, which is an embedding", "a param_filter without it")

    @torch.no_grad()
    def scale(self, weights: Mapping[str, Tensor], masks: Mapping[str, Tensor]) -> None:
        """Multiplies freshly drawn weights by ρ^-½.

        Args:
            weights: dense weights by name; written to. One without any active connection stays as it is.
            masks: bool, True = active, by the same names.
        """
        self.densities = self.densities or {}
        for name, weight in weights.items():
            mask = whole(masks[name])
            # Weights without memory are looked at before a run; nothing can be counted in them.
            active = 0 if mask.is_meta else int(mask.sum())
            density = active / mask.numel() if active else 1.0
            # The variance of a sum over ρ·n inputs is that over n again.
            weight.mul_(density**-0.5)
            self.densities[name] = density

    def check_optimizer(self, optimizer: Optimizer, weights: Mapping[str, Tensor]) -> None:
        """Refuses an optimizer that would train otherwise than SµPar does.

        Args:
            optimizer: made of the sparse model.
            weights: the sparse weights by name.

        Raises:
            ConfigError: a learning rate that is not divided by the density, or an optimizer other than Adam.
        """
        if self.densities is None:
            self._refuse("an optimizer before a model", "apply(model) first, then apply(optimizer)")
        # Accelerate and others wrap the optimizer that steps.
        kinds = type(getattr(optimizer, "optimizer", optimizer)).__mro__
        # By name: other packages have Adams that are none of torch's.
        if not any("adam" in kind.__name__.lower() for kind in kinds):
            self._refuse(kinds[0].__name__, "AdamW or another Adam, whose learning rates it scales")
        names = {weight: name for name, weight in weights.items()}
        for group in optimizer.param_groups:
            for name in [names[one] for one in group["params"] if one in names]:
                if abs(group.get(DENSITY_KEY, 1.0) - self._density(name)) > 1e-9:
                    problem = f"a learning rate of {name} that is not divided by its density {self._density(name):.4g}"
                    remedy = "rarefy.optim.optimizers.build_optimizer(..., densities=sparsity.densities)"
                    self._refuse(problem, f"an optimizer of {remedy}")

    def state_dict(self) -> dict[str, str]:
        """What a checkpoint says of weights that were scaled."""
        return {_OPTION: "supar"}

    def _density(self, name: str) -> float:
        return (self.densities or {}).get(name, 1.0)

    def _refuse(self, beside: str, allowed: str, example: str = "") -> None:
        raise ConfigError(_OPTION, f"supar beside {beside}", allowed, example)

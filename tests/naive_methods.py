"""The methods once more, naively: NumPy, dense arrays, lists of indices, all recomputed, written from the papers.

Of the library only two pure functions are used: where random numbers and the order of equal scores come from.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from rarefy.initializers import generator_for
from rarefy.ties import TieOrder

SEED, RATE, FREQ = 3, 0.2, 2
NAMES = ("0.weight", "2.weight")
SIZES = (12, 16, 8)
Array = np.ndarray


def batch(step: int) -> tuple[Array, Array]:
    x = torch.randn(10, SIZES[0], generator=torch.Generator().manual_seed(step), dtype=torch.float64).numpy()
    return x, np.sin(x[:, : SIZES[2]])


@dataclass
class Look:
    """What a rule sees of one weight at an update; all arrays have its shape."""

    weight: Array
    mask: Array
    gradient: Array  # dense: at every position
    state: Array  # what `observe` wrote
    sparsity: float
    fraction: float
    name: str
    update: int

    @property
    def count(self) -> int:
        return round((1 - self.sparsity) * self.weight.size)

    @property
    def active(self) -> list[int]:
        return np.flatnonzero(self.mask).tolist()

    @property
    def random(self) -> Array:
        generator = generator_for(SEED, self.name, self.update)
        return torch.rand(self.weight.shape, generator=generator).numpy()

    def largest(self, scores: Array, among: list[int], count: int, grows: bool = False) -> list[int]:
        """Indices of the `count` largest scores; the lower key wins a tie."""
        order = TieOrder.of(generator_for(SEED, self.name, self.update))
        keys = (order.other() if grows else order).keys(torch.arange(scores.size)).tolist()
        flat = scores.ravel()
        return sorted(among, key=lambda index: (-flat[index], keys[index]))[:count]

    def among(self, indices: list[int]) -> Array:
        mask = np.zeros(self.weight.size, bool)
        mask[indices] = True
        return mask.reshape(self.weight.shape)


Rule = Callable[[Look], Array]


def static(look: Look) -> Array:
    return look.mask


def gmp(look: Look) -> Array:
    return look.among(look.largest(abs(look.weight), list(range(look.weight.size)), look.count))


def drop_and_grow(look: Look, drop: Array, grow: Array) -> Array:
    stay = min(len(look.active) - round(look.fraction * len(look.active)), look.count)
    kept = look.largest(drop, look.active, stay)
    return look.among(kept + grown(look, kept, grow))


def grown(look: Look, kept: list[int], grow: Array) -> list[int]:
    others = sorted(set(range(look.weight.size)) - set(kept))
    return look.largest(grow, others, look.count - len(kept), grows=True)


def set_(look: Look) -> Array:
    return drop_and_grow(look, abs(look.weight), look.random)


def rigl(look: Look) -> Array:
    return drop_and_grow(look, abs(look.weight), abs(look.gradient))


def mest(look: Look) -> Array:
    return drop_and_grow(
        look, abs(look.weight) + 0.5 * abs(np.where(look.mask, look.gradient, 0)), look.random
    )


def movement(look: Look) -> Array:
    stay = look.largest(look.state, look.active, look.count)
    # Where the sparsity falls, what scores nothing comes in by the order of ties.
    others = sorted(set(range(look.weight.size)) - set(look.active))
    return look.among(stay + look.largest(np.zeros(look.weight.size), others, look.count - len(stay)))


def moved(state: Array, weight: Array, gradient: Array) -> Array:
    return state - weight * gradient


def powerprop(look: Look) -> Array:
    return look.among(look.largest(abs(look.weight), look.active, look.count))


def powers(alpha: float) -> Callable[[Array, Array], Array]:
    """A step of gradient descent on θ, where w = sign(θ)·|θ|^α."""

    def step(weight: Array, gradient: Array) -> Array:
        theta = np.sign(weight) * abs(weight) ** (1 / alpha)
        theta = theta - RATE * gradient * alpha * abs(theta) ** (alpha - 1)
        return np.sign(theta) * abs(theta) ** alpha

    return step


def top_kast(look: Look) -> Array:
    forward = np.flatnonzero(strongest(look.weight, look.mask, look)).tolist()
    others = sorted(set(range(look.weight.size)) - set(forward))
    return look.among(forward + look.largest(look.random, others, look.count - len(forward)))


def strongest(weight: Array, mask: Array, look: Look) -> Array:
    """The forward set: a tenth of the positions."""
    return look.among(look.largest(abs(weight), np.flatnonzero(mask).tolist(), round(0.1 * weight.size)))


def granet(look: Look) -> Array:
    pruned = look.largest(abs(look.weight), look.active, look.count)
    kept = look.largest(abs(look.weight), pruned, len(pruned) - round(look.fraction * len(pruned)))
    return look.among(kept + grown(look, kept, abs(look.gradient)))


def srigl(look: Look, min_salient: float = 0.0) -> Array:
    rows, columns = look.weight.shape
    dropped = round(look.fraction * len(look.active))
    kept = look.largest(abs(look.weight), look.active, len(look.active) - dropped)
    inactive = sorted(set(range(look.weight.size)) - set(look.active))
    salient = kept + look.largest(abs(look.gradient), inactive, dropped, grows=True)
    fan_in = round((1 - look.sparsity) * columns)
    alive = list(range(rows))
    if min_salient:
        counts = [sum(index // columns == row for index in salient) for row in alive]
        alive = [row for row in alive if look.mask[row].any() and counts[row] >= max(1, min_salient * fan_in)]
    found = []
    for row in alive:
        mine = look.largest(
            abs(look.weight), [i for i in kept if i // columns == row], fan_in * rows // len(alive)
        )
        rest = [i for i in range(row * columns, (row + 1) * columns) if i not in mine]
        more = min(columns, fan_in * rows // len(alive)) - len(mine)
        found += mine + look.largest(abs(look.gradient), rest, more, grows=True)
    return look.among(found)


def ablating(look: Look) -> Array:
    return srigl(look, 0.7)


@dataclass(frozen=True)
class Case:
    """A block of options, and the same for the naive version.

    Args:
        rule: the next mask.
        options: beside name, seed and update.
        sparsity: (step, number of updates before) → target.
        fraction: step → share that is dropped.
        observe: (state, weight, gradient of active connections) → state, before each step.
        forward: (weight, mask) → the mask that forward passes use.
        step: (weight, gradient of active connections) → weight after a step.
    """

    rule: Rule
    options: Mapping[str, Any]
    sparsity: Callable[[int, int], float]
    fraction: Callable[[int], float] = field(default=lambda step: 0.0)
    observe: Callable[[Array, Array, Array], Array] = field(default=lambda state, weight, gradient: state)
    forward: Callable[[Array, Array, Look], Array] | None = None
    step: Callable[[Array, Array], Array] = field(default=lambda weight, gradient: weight - RATE * gradient)


def cubic(init: float, final: float, stop: int) -> Callable[[int, int], float]:
    return lambda step, update: final + (init - final) * (1 - min(step, stop) / stop) ** 3


def written(init: float, final: float, stop: int) -> dict[str, Any]:
    return {"type": "polynomial", "init": init, "final": final, "start": 0, "stop": stop}


CYCLE = [0.5, 0.8, 0.65]
ANNEALED = {"type": "cosine", "init": 0.4, "half_period": 60}


def annealed(step: int) -> float:
    return 0.2 + 0.2 * float(np.cos(np.pi * step / 60))


def cycle(step: int, update: int) -> float:
    return CYCLE[update % 3]


CASES: Mapping[str, Case] = {
    "static": Case(static, {"sparsity": 0.8}, lambda step, update: 0.8),
    "gmp": Case(gmp, {"sparsity": written(0.1, 0.9, 40)}, cubic(0.1, 0.9, 40)),
    "gmp cycling": Case(gmp, {"sparsity": CYCLE}, cycle),
    "set": Case(set_, {"sparsity": 0.8, "drop_fraction": ANNEALED}, lambda step, update: 0.8, annealed),
    "set cycling": Case(set_, {"sparsity": CYCLE, "drop_fraction": ANNEALED}, cycle, annealed),
    "rigl": Case(rigl, {"sparsity": 0.8, "drop_fraction": ANNEALED}, lambda step, update: 0.8, annealed),
    "rigl cycling": Case(rigl, {"sparsity": CYCLE, "drop_fraction": ANNEALED}, cycle, annealed),
    "movement": Case(movement, {"sparsity": written(0.0, 0.9, 40)}, cubic(0.0, 0.9, 40), observe=moved),
    "movement cycling": Case(movement, {"sparsity": CYCLE}, cycle, observe=moved),
    "powerprop": Case(powerprop, {"sparsity": written(0.1, 0.9, 40)}, cubic(0.1, 0.9, 40), step=powers(2.0)),
    "powerprop of another power": Case(
        powerprop,
        {"sparsity": written(0.1, 0.9, 40), "alpha": 1.375},
        cubic(0.1, 0.9, 40),
        step=powers(1.375),
    ),
    "top_kast": Case(top_kast, {"sparsity": CYCLE, "forward_sparsity": 0.9}, cycle, forward=strongest),
    # Phases of two steps: compressed, dense, compressed, …
    "ac_dc": Case(
        gmp,
        {"sparsity": 0.8, "update": {"freq": 2, "stop": 53}},
        lambda step, update: [0.8, 0.0][update % 2],
    ),
    "granet": Case(
        granet,
        {"sparsity": written(0.5, 0.9, 40), "drop_fraction": ANNEALED},
        cubic(0.5, 0.9, 40),
        annealed,
    ),
    "granet cycling": Case(granet, {"sparsity": CYCLE, "drop_fraction": ANNEALED}, cycle, annealed),
    "srigl": Case(srigl, {"sparsity": CYCLE, "drop_fraction": ANNEALED}, cycle, annealed),
    "srigl ablating": Case(
        ablating,
        {"sparsity": 0.75, "drop_fraction": ANNEALED, "min_salient": 0.7},
        lambda step, update: 0.75,
        annealed,
    ),
    "mest": Case(
        mest, {"sparsity": CYCLE, "drop_fraction": ANNEALED, "gradient_share": 0.5}, cycle, annealed
    ),
}


class Network:
    """Two layers with masks beside them, trained by plain SGD.

    Args:
        states: of the model that it shall equal.
        case: the method.
    """

    def __init__(self, states: Mapping[str, torch.Tensor], case: Case) -> None:
        self.case = case
        self.weights = [states[name].numpy().copy() for name in NAMES]
        self.biases = [states[name.replace("weight", "bias")].numpy().copy() for name in NAMES]
        self.masks = [states[f"{name}_mask"].numpy().copy() for name in NAMES]
        self.used = [mask.copy() for mask in self.masks]
        self.states = [np.zeros_like(weight) for weight in self.weights]
        self.updates = 0
        self.moved = 0
        for index in range(2):
            self.restrict(index, self.look(index, self.weights[index], 0))
        self.updates = 1

    def gradients(self, step: int) -> tuple[list[Array], list[Array]]:
        """Those of weights, at every position, and of biases."""
        x, target = batch(step)
        first, second = (
            np.where(used, weight, 0) for used, weight in zip(self.used, self.weights, strict=True)
        )
        hidden = np.tanh(x @ first.T + self.biases[0])
        slope = 2 * (hidden @ second.T + self.biases[1] - target) / target.size
        inner = (slope @ second) * (1 - hidden**2)
        return [inner.T @ x, slope.T @ hidden], [inner.sum(0), slope.sum(0)]

    def train(self, step: int) -> None:
        """One step, numbered from 1, and the update after it."""
        dense, biases = self.gradients(step)
        for index in range(2):
            active = np.where(self.masks[index], dense[index], 0)
            self.states[index] = self.case.observe(self.states[index], self.weights[index], active)
            self.weights[index] = self.case.step(self.weights[index], active)
            self.biases[index] = self.biases[index] - RATE * biases[index]
        if step % FREQ == 0:
            for index in range(2):
                self.update(index, dense[index], step)
            self.updates += 1

    def look(self, index: int, gradient: Array, step: int) -> Look:
        sparsity = self.case.sparsity(step, self.updates)
        facts = (sparsity, self.case.fraction(step), NAMES[index], self.updates)
        return Look(self.weights[index], self.masks[index], gradient, self.states[index], *facts)

    def update(self, index: int, gradient: Array, step: int) -> None:
        look = self.look(index, gradient, step)
        mask = self.case.rule(look)
        stays = mask & look.mask
        self.moved += int((mask != look.mask).sum())
        self.weights[index] = np.where(stays, look.weight, 0)
        self.states[index] = np.where(stays, look.state, 0)
        self.masks[index] = mask
        self.restrict(index, look)

    def restrict(self, index: int, look: Look) -> None:
        """Chooses what forward passes use."""
        self.used[index] = self.masks[index]
        if self.case.forward:
            self.used[index] = self.case.forward(self.weights[index], self.masks[index], look)

"""jaxpruner, RigL and gradual magnitude pruning; the whole loop in JAX, compiled."""

# pyright: reportMissingImports=false, reportArgumentType=false, reportCallIssue=false, reportOperatorIssue=false

import functools
import itertools

import jax
import jax.numpy as jnp
import jaxpruner
import numpy as np
import optax
from jaxpruner.sparsity_schedules import PeriodicSchedule, PolynomialSchedule

from .setting import CLASSES, INPUTS, SPARSITY, UPDATE_EVERY, WIDTH, main

SIZES = (INPUTS, WIDTH, WIDTH, CLASSES)


def first_params(seed):
    """Weights as torch.nn.Linear draws them."""
    params = {}
    for number, (inputs, outputs) in enumerate(itertools.pairwise(SIZES)):
        keys = jax.random.split(jax.random.PRNGKey(100 * seed + number))
        bound = inputs**-0.5
        params[f"layer_{number}"] = {
            "kernel": jax.random.uniform(keys[0], (inputs, outputs), minval=-bound, maxval=bound),
            "bias": jax.random.uniform(keys[1], (outputs,), minval=-bound, maxval=bound),
        }
    return params


def logits(params, x):
    for number in range(len(params)):
        layer = params[f"layer_{number}"]
        x = x @ layer["kernel"] + layer["bias"]
        if number < len(params) - 1:
            x = jax.nn.relu(x)
    return x


# begin
def train(setting, pruner):
    rates = jnp.array([setting.lr * setting.rate(step) for step in range(setting.steps)])
    optimizer = pruner.wrap_optax(optax.adamw(lambda step: rates[step], weight_decay=0.01))
    params = first_params(setting.seed)
    state = optimizer.init(params)
    params = pruner.post_gradient_update(params, state)

    def loss(params, x, y):
        return optax.softmax_cross_entropy_with_integer_labels(logits(params, x), y).mean()

    @jax.jit
    def step(params, state, x, y):
        gradients = jax.grad(loss)(params, x, y)
        updates, state = optimizer.update(gradients, state, params)
        params = optax.apply_updates(params, updates)
        return pruner.post_gradient_update(params, state), state

    for x, y in setting.batches():
        params, state = step(params, state, x, y)
    kernels = [np.asarray(layer["kernel"]) for layer in params.values()]
    zeros = 1 - sum(np.count_nonzero(one) for one in kernels) / sum(one.size for one in kernels)
    return lambda x: np.asarray(logits(params, x).argmax(1)), zeros


def rigl(setting):
    pruner = jaxpruner.RigL(
        scheduler=PeriodicSchedule(UPDATE_EVERY, UPDATE_EVERY, setting.stop),
        sparsity_distribution_fn=functools.partial(
            jaxpruner.sparsity_distributions.uniform, sparsity=SPARSITY
        ),
        drop_fraction_fn=lambda step: 0.15 * (1 + jnp.cos(jnp.pi * step / setting.stop)),
        rng_seed=jax.random.PRNGKey(setting.seed),
    )
    return train(setting, pruner)


# end
def magnitude(setting):
    """The same with another pruner."""
    pruner = jaxpruner.MagnitudePruning(
        scheduler=PolynomialSchedule(UPDATE_EVERY, setting.begin, setting.stop),
        sparsity_distribution_fn=functools.partial(
            jaxpruner.sparsity_distributions.uniform, sparsity=SPARSITY
        ),
    )
    return train(setting, pruner)


if __name__ == "__main__":
    main({"rigl": rigl, "magnitude": magnitude}, __file__)

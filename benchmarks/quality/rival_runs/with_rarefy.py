"""rarefy: RigL, and gradual magnitude pruning."""

import rarefy

from .setting import SPARSITY, UPDATE_EVERY, main
from .torch_loop import adamw, loop, network, start


# begin
def rigl(setting):
    start(setting)
    model = network()
    optimizer = adamw(model, setting)
    drop = {"type": "cosine", "init": 0.3, "half_period": setting.stop}
    update = {"freq": UPDATE_EVERY, "stop": setting.stop}
    sparsity = rarefy.RigL(SPARSITY, update=update, drop_fraction=drop)
    sparsity.apply(model)
    sparsity.apply(optimizer)
    predict = loop(model, optimizer, setting)
    return predict, zeros(sparsity)


# end
def gmp(setting):
    """The same with another algorithm."""
    start(setting)
    model = network()
    optimizer = adamw(model, setting)
    rise = {"type": "polynomial", "init": 0, "final": SPARSITY, "start": setting.begin, "stop": setting.stop}
    update = {"freq": UPDATE_EVERY, "start": setting.begin, "stop": setting.stop + UPDATE_EVERY}
    sparsity = rarefy.GMP(rise, update=update)
    sparsity.apply(model)
    sparsity.apply(optimizer)
    predict = loop(model, optimizer, setting)
    return predict, zeros(sparsity)


def static(setting):
    """The same with another algorithm."""
    start(setting)
    model = network()
    optimizer = adamw(model, setting)
    sparsity = rarefy.Static(SPARSITY)
    sparsity.apply(model)
    sparsity.apply(optimizer)
    predict = loop(model, optimizer, setting)
    return predict, zeros(sparsity)


def zeros(sparsity):
    """The share of inactive connections."""
    every = sparsity.parameters.values()
    return 1 - sum(one.active for one in every) / sum(one.shape.numel() for one in every)


if __name__ == "__main__":
    main({"rigl": rigl, "gmp": gmp, "static": static}, __file__)

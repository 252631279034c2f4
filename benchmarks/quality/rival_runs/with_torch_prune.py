"""torch.nn.utils.prune: gradual magnitude pruning; every call prunes a share of what is left."""

from torch import nn
from torch.nn.utils import prune

from .setting import main
from .torch_loop import adamw, loop, network, start, zeros_of


# begin
def gradual(setting):
    start(setting)
    model = network()
    layers = [module for module in model if isinstance(module, nn.Linear)]
    for layer in layers:
        prune.identity(layer, "weight")
    reached = 0.0

    def after_step(step):
        nonlocal reached
        if not setting.is_update(step):
            return
        wanted = setting.cubic(step)
        for layer in layers:
            prune.l1_unstructured(layer, "weight", amount=(wanted - reached) / (1 - reached))
        reached = wanted

    predict = loop(model, adamw(model, setting), setting, after_step)
    for layer in layers:
        prune.remove(layer, "weight")
    return predict, zeros_of(model)


# end
if __name__ == "__main__":
    main({"gradual": gradual}, __file__)

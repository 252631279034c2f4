"""sparseprop: a fixed random mask, which is what its layers are for."""

# pyright: reportMissingImports=false, reportArgumentType=false, reportCallIssue=false, reportOperatorIssue=false

import torch
from sparseprop.modules.linear import SparseLinear
from torch import nn

from .setting import SPARSITY, main
from .torch_loop import adamw, loop, network, start


# begin
def static(setting):
    start(setting)
    model = network()
    for number, layer in enumerate(model):
        if isinstance(layer, nn.Linear):
            layer.weight.data *= torch.rand_like(layer.weight) >= SPARSITY
            model[number] = SparseLinear.from_dense(layer)
    predict = loop(model, adamw(model, setting), setting)
    layers = [layer for layer in model if isinstance(layer, SparseLinear)]
    return predict, 1 - sum(len(layer.W_val) for layer in layers) / sum(layer.N * layer.M for layer in layers)


# end
if __name__ == "__main__":
    main({"static": static}, __file__)

"""sparselab: its RigL, which has no end and no falling drop fraction."""

# pyright: reportMissingImports=false, reportArgumentType=false, reportCallIssue=false, reportOperatorIssue=false

import sparselab

from .setting import SPARSITY, UPDATE_EVERY, main
from .torch_loop import adamw, loop, network, start


# begin
def rigl(setting):
    start(setting)
    model = network(lambda inputs, outputs: sparselab.SparseLinear(inputs, outputs, sparsity=SPARSITY))
    algorithm = sparselab.RigL(SPARSITY, drop_fraction=0.3, update_freq=UPDATE_EVERY, seed=setting.seed)
    model.apply(algorithm)

    def after_step(step):
        if step <= setting.stop:
            algorithm.step()

    predict = loop(model, adamw(model, setting), setting, after_step)
    return predict, 1 - sum(layer.nnz for layer in algorithm.layers) / sum(
        layer.in_features * layer.out_features for layer in algorithm.layers
    )


# end
def static(setting):
    """The same without an algorithm."""
    start(setting)
    model = network(lambda inputs, outputs: sparselab.SparseLinear(inputs, outputs, sparsity=SPARSITY))
    predict = loop(model, adamw(model, setting), setting)
    layers = [layer for layer in model if isinstance(layer, sparselab.SparseLinear)]
    return predict, 1 - sum(layer.nnz for layer in layers) / sum(
        layer.in_features * layer.out_features for layer in layers
    )


if __name__ == "__main__":
    main({"rigl": rigl, "static": static}, __file__)

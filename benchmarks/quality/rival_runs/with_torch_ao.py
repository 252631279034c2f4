"""torch.ao.pruning: gradual magnitude pruning of single weights."""

from torch.ao.pruning import WeightNormSparsifier

from .setting import SPARSITY, main
from .torch_loop import adamw, loop, network, start, zeros_of


# begin
def gradual(setting):
    start(setting)
    model = network()
    sparsifier = WeightNormSparsifier(sparsity_level=SPARSITY, sparse_block_shape=(1, 1))
    sparsifier.prepare(model, [{"tensor_fqn": f"{number}.weight"} for number in (0, 2, 4)])

    def after_step(step):
        if setting.is_update(step):
            for group in sparsifier.groups:
                group["sparsity_level"] = setting.cubic(step)
            sparsifier.step()

    predict = loop(model, adamw(model, setting), setting, after_step)
    sparsifier.squash_mask()
    return predict, zeros_of(model)


# end
if __name__ == "__main__":
    main({"gradual": gradual}, __file__)

"""Dense torch."""

from .setting import main
from .torch_loop import adamw, loop, network, start, zeros_of


# begin
def dense(setting):
    start(setting)
    model = network()
    predict = loop(model, adamw(model, setting), setting)
    return predict, zeros_of(model)


# end
if __name__ == "__main__":
    main({"dense": dense}, __file__)

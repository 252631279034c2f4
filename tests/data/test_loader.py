import pytest
import torch
from torch.utils.data import TensorDataset

from rarefy.data import LoaderConfig, ResumableLoader, make_loader
from rarefy.errors import ConfigError, RarefyError

DATA = TensorDataset(torch.arange(23))


def make(workers=0, **options):
    config = LoaderConfig(batch_size=4, num_workers=workers, **options)
    return make_loader(DATA, len(DATA), config, shuffle=True, seed=5)


def read(loader):
    return [batch[0].tolist() for batch in loader]


@pytest.mark.parametrize("workers", [0, 1, 2])
@pytest.mark.parametrize(("epoch", "batch"), [(0, 0), (1, 3), (4, 5)])
def test_order_does_not_depend_on_workers(workers, epoch, batch):
    whole, part = make(), make(workers)
    whole.set_position(epoch)
    part.set_position(epoch, batch)
    assert read(part) == read(whole)[batch:]


def test_persistent_workers_follow_the_position():
    loader, plain = make(1, persistent_workers=True, prefetch_factor=2), make()
    for position in ((0, 0), (1, 0), (0, 3)):
        loader.set_position(*position)
        plain.set_position(*position)
        assert read(loader) == read(plain)


def test_prefetch_factor_may_be_null():
    assert read(make(1, prefetch_factor=None)) == read(make())


def test_global_generator_is_left_alone():
    torch.manual_seed(0)
    before = torch.get_rng_state()
    read(make())
    assert torch.equal(torch.get_rng_state(), before)


def test_protocol():
    assert isinstance(make(), ResumableLoader)
    assert len(make()) == 5 and len(make(drop_last=False)) == 6


def test_position_beyond_the_epoch():
    with pytest.raises(RarefyError, match="an epoch has 5 batches"):
        make().set_position(0, 6)


@pytest.mark.parametrize(
    ("size", "drop_last", "count"), [(3, True, None), (0, False, None), (9, True, 3), (0, True, 8)]
)
def test_no_batch_in_an_epoch(size, drop_last, count):
    config = LoaderConfig(batch_size=4, drop_last=drop_last)
    with pytest.raises(ConfigError, match=r"^batch_size: 4 with \d samples in an epoch is not allowed"):
        make_loader(DATA, size, config, shuffle=False, seed=0, num_samples=count)


def test_a_small_last_batch_may_be_the_only_one():
    config = LoaderConfig(batch_size=4, drop_last=False)
    assert read(make_loader(DATA, 3, config, shuffle=False, seed=0)) == [[0, 1, 2]]

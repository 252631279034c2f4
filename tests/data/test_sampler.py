import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rarefy.data import ResumableBatchSampler, epoch_order
from rarefy.errors import RarefyError

SIZES = st.integers(1, 40)


@given(size=SIZES, epoch=st.integers(0, 5), seed=st.integers(0, 2**40))
def test_a_shuffled_epoch_is_randperm_of_seed_plus_epoch(size, epoch, seed):
    expected = torch.randperm(size, generator=torch.Generator().manual_seed(seed + epoch))
    assert torch.equal(epoch_order(size, epoch=epoch, shuffle=True, seed=seed), expected)


@given(size=SIZES, count=SIZES, seed=st.integers(0, 100))
def test_fewer_samples_are_the_start_of_the_whole_order(size, count, seed):
    order = epoch_order(size, epoch=0, shuffle=True, seed=seed, num_samples=min(size, count))
    assert torch.equal(order, epoch_order(size, epoch=0, shuffle=True, seed=seed)[: len(order)])


@given(size=SIZES, count=st.integers(1, 150), shuffle=st.booleans())
def test_every_sample_comes_equally_often(size, count, shuffle):
    order = epoch_order(size, epoch=1, shuffle=shuffle, seed=3, num_samples=count)
    times = torch.bincount(order, minlength=size)
    assert len(order) == count and int(times.max() - times.min()) <= 1


def test_repeated_epochs_are_shuffled_together():
    order = epoch_order(50, epoch=0, shuffle=True, seed=0, num_samples=100).tolist()
    assert len(set(order[:50])) < 50


def test_order_without_shuffling():
    assert epoch_order(4, epoch=3, shuffle=False, seed=0).tolist() == [0, 1, 2, 3]


@given(size=SIZES, batch_size=st.integers(1, 12), drop_last=st.booleans(), data=st.data())
def test_any_position_continues_the_whole_epoch(size, batch_size, drop_last, data):
    options = {"shuffle": True, "seed": 7, "drop_last": drop_last}
    whole = ResumableBatchSampler(size, batch_size, **options)
    epoch = data.draw(st.integers(0, 3))
    whole.set_position(epoch)
    batches = list(whole)
    batch = data.draw(st.integers(0, len(whole)))
    part = ResumableBatchSampler(size, batch_size, **options)
    part.set_position(epoch, batch)
    assert list(part) == batches[batch:]
    assert len(part) == len(whole) == len(batches)


@given(size=SIZES, batch_size=st.integers(1, 12))
def test_drop_last(size, batch_size):
    kept = ResumableBatchSampler(size, batch_size, shuffle=False, seed=0, drop_last=False)
    dropped = ResumableBatchSampler(size, batch_size, shuffle=False, seed=0, drop_last=True)
    assert [index for batch in kept for index in batch] == list(range(size))
    assert list(dropped) == [batch for batch in kept if len(batch) == batch_size]


def test_iterating_does_not_move_the_position():
    batches = ResumableBatchSampler(10, 3, shuffle=True, seed=0)
    batches.set_position(2, 1)
    assert list(batches) == list(batches)


@pytest.mark.parametrize(("epoch", "batch"), [(-1, 0), (0, -1), (0, 4)])
def test_positions_that_do_not_exist(epoch, batch):
    batches = ResumableBatchSampler(10, 3, shuffle=True, seed=0)
    with pytest.raises(RarefyError, match=rf"epoch {epoch}, batch {batch}: an epoch has 3 batches"):
        batches.set_position(epoch, batch)

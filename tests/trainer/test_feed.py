"""The training data as an endless stream with a position."""

import random
import signal

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Dataset, TensorDataset

from rarefy import data as processors
from rarefy.checkpoint import rng
from rarefy.data import LoaderConfig, shard
from rarefy.errors import RarefyError
from rarefy.trainer.feed import TrainFeed, open_loader


class Noisy(Dataset):
    """Augments with three global generators."""

    def __len__(self) -> int:
        return 10

    def __getitem__(self, index: int) -> torch.Tensor:
        return torch.tensor([index, torch.rand(()), random.random(), np.random.rand()])


def steps(feed: TrainFeed, count: int) -> list:
    return [
        [b.tolist() if isinstance(b, torch.Tensor) else b for b in feed.next_step()] for _ in range(count)
    ]


def test_a_step_never_spans_two_epochs() -> None:
    feed = TrainFeed([0, 1, 2, 3, 4], accumulate=2)
    assert steps(feed, 4) == [[0, 1], [2, 3], [4], [0, 1]]
    assert (feed.epoch, feed.batch, feed.steps_per_epoch) == (1, 2, 3)


def test_factories_are_opened_once() -> None:
    made = []
    feed = TrainFeed(lambda: made.append(1) or [7])  # type: ignore[arg-type, func-returns-value]
    assert steps(feed, 3) == [[7], [7], [7]]
    assert made == [1]


def test_unknown_length() -> None:
    class Stream:
        def __iter__(self):
            return iter("ab")

    assert TrainFeed(Stream()).steps_per_epoch is None
    assert steps(TrainFeed(Stream()), 3) == [["a"], ["b"], ["a"]]


@pytest.mark.parametrize(
    "empty", [[], lambda: [], DataLoader(TensorDataset(torch.ones(3)), 4, drop_last=True)]
)
def test_data_without_a_batch_is_refused_at_once(empty: object) -> None:
    with pytest.raises(RarefyError, match="fewer samples than one batch"):
        TrainFeed(empty)  # type: ignore[arg-type]


def test_what_is_no_data_is_refused() -> None:
    with pytest.raises(RarefyError, match="int is no training or validation data"):
        open_loader(5)  # type: ignore[arg-type]


class BlockedSignals(Dataset):
    def __len__(self) -> int:
        return 2

    def __getitem__(self, index: int) -> bool:
        return {signal.SIGINT, signal.SIGTERM} <= signal.pthread_sigmask(signal.SIG_BLOCK, [])


@pytest.mark.parametrize("batch", [0, 1])
def test_signals_to_the_process_group_leave_workers_alone(batch: int) -> None:
    feed = TrainFeed(DataLoader(BlockedSignals(), batch_size=None, num_workers=1))
    feed.load_state_dict({"epoch": 0, "batch": batch, "at_epoch_start": {}})
    assert feed.next_step() == [True]
    feed.close()
    assert signal.SIGTERM not in signal.pthread_sigmask(signal.SIG_BLOCK, [])


def test_a_step_can_be_given_back() -> None:
    feed, again = TrainFeed([0, 1, 2], accumulate=2), TrainFeed([0, 1, 2], accumulate=2)
    feed.give_back(feed.next_step())
    again.load_state_dict(feed.state_dict())
    assert again.next_step() == [0, 1]


def test_an_iterator_that_is_used_up_is_named() -> None:
    feed = TrainFeed(iter([1, 2]))
    steps(feed, 2)
    with pytest.raises(RarefyError, match="no batch in epoch 1: an iterator gives its batches only once"):
        feed.next_step()


def test_a_loader_with_a_position_is_asked_to_go_there() -> None:
    class Positioned:
        asked: tuple = ()

        def set_position(self, epoch: int, batch: int = 0) -> None:
            self.asked = (epoch, batch)

        def __iter__(self):
            epoch, batch = self.asked
            return iter([f"{epoch}.{index}" for index in range(batch, 3)])

        def __len__(self) -> int:
            return 3

    feed = TrainFeed(Positioned())
    assert steps(feed, 4) == [["0.0"], ["0.1"], ["0.2"], ["1.0"]]
    fresh = TrainFeed(Positioned())
    fresh.load_state_dict(feed.state_dict())
    assert fresh.data.asked == (1, 1)  # type: ignore[attr-defined]
    assert steps(fresh, 3) == [["1.1"], ["1.2"], ["2.0"]]


def test_samplers_are_told_the_epoch() -> None:
    class Sampler(torch.utils.data.Sampler):
        epochs: list[int] = []  # noqa: RUF012

        def set_epoch(self, epoch: int) -> None:
            self.epochs.append(epoch)

        def __iter__(self):
            return iter(range(2))

        def __len__(self) -> int:
            return 2

    feed = TrainFeed(DataLoader(TensorDataset(torch.arange(2)), sampler=Sampler()))
    steps(feed, 5)
    assert Sampler.epochs == [0, 1, 2]


def make_loader(kind: str, workers: int) -> DataLoader:
    if kind == "global generator":
        return DataLoader(Noisy(), 3, shuffle=True, num_workers=workers)
    return DataLoader(
        Noisy(), 3, shuffle=True, num_workers=workers, generator=torch.Generator().manual_seed(4)
    )


@pytest.mark.parametrize("kind", ["global generator", "own generator"])
@pytest.mark.parametrize("taken", [0, 1, 2, 3, 5])
def test_any_loader_continues_with_the_very_next_batch(kind: str, taken: int) -> None:
    torch.manual_seed(0)
    random.seed(0)
    np.random.seed(0)
    feed = TrainFeed(make_loader(kind, 0), accumulate=2)
    steps(feed, taken)
    state, generators = feed.state_dict(), rng.capture()
    expected = steps(feed, 5)

    torch.manual_seed(99)
    fresh = TrainFeed(make_loader(kind, 0), accumulate=2)
    fresh.load_state_dict(state)
    rng.restore(generators)
    assert steps(fresh, 5) == expected


def test_workers_change_neither_the_order_nor_the_generators() -> None:
    def run(workers: int) -> tuple[list, float]:
        torch.manual_seed(0)
        data = TensorDataset(torch.arange(10))
        feed = TrainFeed(DataLoader(data, 3, shuffle=True, num_workers=workers))
        found = [[batch[0].tolist() for batch in feed.next_step()] for _ in range(6)]
        feed.close()
        return found, torch.rand(()).item()

    assert run(0) == run(2)


def test_a_position_that_depends_on_the_number_of_processes_is_refused_in_another() -> None:
    position = TrainFeed(shard([1, 2, 3, 4], 0, 2)).state_dict()
    assert position["processes"] == 2
    TrainFeed(shard([1, 2, 3, 4], 1, 2)).load_state_dict(position)
    with pytest.raises(
        RarefyError, match="which 2 processes shared, batch by batch, and this run has 1; start 2"
    ):
        TrainFeed([1, 2]).load_state_dict(position)


def test_a_position_in_batches_of_samples_holds_in_any_number_of_processes() -> None:
    def feed(rank: int, processes: int) -> TrainFeed:
        data = TensorDataset(torch.arange(24))
        loader = processors.make_loader(data, 24, LoaderConfig(batch_size=4), shuffle=True, seed=5)
        return TrainFeed(shard(loader, rank, processes))

    first = feed(1, 2)
    first.next_step()
    position = first.state_dict()
    alone = feed(0, 1)
    alone.load_state_dict(position)
    [[whole]] = alone.next_step()
    dealt = []
    for rank in range(4):
        one = feed(rank, 4)
        one.load_state_dict(position)
        [[batch]] = one.next_step()
        dealt += batch.tolist()
    assert dealt == whole.tolist()
    # As it was when processors dealt out whole batches.
    with pytest.raises(RarefyError, match="this run has 1; begin anew with"):
        alone.load_state_dict({**position, "processes": 2})

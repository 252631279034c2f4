"""Numbers of connections that go to other places."""

from __future__ import annotations

from torch import Tensor

from rarefy.kernels import native, reference


def move_entries(entries: Tensor, sources: Tensor) -> Tensor:
    """The entries at their new places.

    Args:
        entries: [old connections], any dtype; compiled for 4 bytes on the CPU.
        sources: int32 or int64 [new connections]: the old place of each, −1 where there was none.

    Returns:
        [new connections], the dtype of entries; zero where there was no old place.

    Example:
        >>> import torch
        >>> move_entries(torch.tensor([5.0, 7.0]), torch.tensor([1, -1, 0]))
        tensor([7., 0., 5.])
    """
    is_plain = entries.is_cpu and sources.is_cpu and entries.element_size() == 4
    # Of more entries the places would not fit into what the kernel reads.
    is_plain &= entries.numel() < 2**31
    if is_plain and native.has("panels_move") and native.unwatched(entries, sources):
        return native.move(entries.contiguous(), sources.int().contiguous())
    return reference.move(entries, sources)

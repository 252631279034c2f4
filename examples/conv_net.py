"""A convolutional network and its images, for conv_net.yaml."""

from collections.abc import Iterator

import torch
from torch import Tensor, nn

CENTRES = torch.tensor([[4.0, 4.0], [4.0, 12.0], [12.0, 4.0], [12.0, 12.0]])


class ConvNet(nn.Module):
    """Tells in which quarter of a 16 × 16 image the bright spot is."""

    def __init__(self, width: int = 32, classes: int = 4) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(1, width, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(width, 2 * width, 3, padding=1),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(2),
            nn.Flatten(),
            nn.Linear(8 * width, classes),
        )

    def forward(self, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """The loss and the scores [batch, classes]."""
        scores = self.layers(batch["images"])
        return nn.functional.cross_entropy(scores, batch["labels"]), scores


class Spots:
    """Noisy images of one bright spot, the same in every epoch."""

    def __init__(self, batch_size: int, batches: int, seed: int) -> None:
        self.batch_size, self.batches, self.seed = batch_size, batches, seed

    def __len__(self) -> int:
        return self.batches

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        generator = torch.Generator().manual_seed(self.seed)
        pixels = torch.cartesian_prod(torch.arange(16.0), torch.arange(16.0))
        for _ in range(self.batches):
            labels = torch.randint(4, (self.batch_size,), generator=generator)
            places = CENTRES[labels] + torch.randn(self.batch_size, 2, generator=generator)
            images = torch.exp(-torch.cdist(places, pixels).square() / 8).reshape(-1, 1, 16, 16)
            noise = torch.randn(images.shape, generator=generator)
            yield {"images": images + 0.5 * noise, "labels": labels}


def make_spots(batch_size: int = 32, batches: int = 50, seed: int = 0) -> Spots:
    """What a `data_processor` names: a function that returns an iterable of batches."""
    return Spots(batch_size, batches, seed)

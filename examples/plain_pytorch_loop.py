"""RigL in a training loop of one's own, without rarefy's Trainer: two lines more than the dense loop."""

import torch

import rarefy


def main(steps: int = 300) -> float:
    """Trains a small network to tell whether a point lies in a ring; returns its accuracy."""
    torch.manual_seed(0)
    points = torch.randn(4096, 2)
    inside = ((points.norm(dim=1) - 1.2).abs() < 0.5).float()
    model = torch.nn.Sequential(
        torch.nn.Linear(2, 256),
        torch.nn.ReLU(),
        torch.nn.Linear(256, 256),
        torch.nn.ReLU(),
        torch.nn.Linear(256, 1),
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)

    sparsity = rarefy.configure(
        {
            "algorithm": "rigl",
            "sparsity": 0.9,
            "param_filter": "2.weight",
            "update": {"freq": 20, "stop": 225},
        }
    )
    sparsity.apply(model)
    sparsity.apply(optimizer)

    for _ in range(steps):
        optimizer.zero_grad()
        loss = torch.nn.functional.binary_cross_entropy_with_logits(model(points).squeeze(1), inside)
        loss.backward()
        optimizer.step()

    print(rarefy.summary(sparsity))
    accuracy = ((model(points).squeeze(1) > 0) == inside.bool()).float().mean().item()
    print(f"accuracy {accuracy:.3f}")
    return accuracy


if __name__ == "__main__":
    main()

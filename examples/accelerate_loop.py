"""A training loop with Accelerate, made sparse by one line: pip install 'rarefy[accelerate]'."""

import torch
from accelerate import Accelerator

import rarefy
from rarefy.integrations.accelerate import sparsify


def main(folder: str = "model_dir/accelerate_loop", steps: int = 60) -> float:
    """Trains with gradient accumulation, saves, and returns the measured sparsity."""
    accelerator = Accelerator(gradient_accumulation_steps=2)
    model = torch.nn.Sequential(torch.nn.Linear(16, 64), torch.nn.GELU(), torch.nn.Linear(64, 16))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    block = {"algorithm": "rigl", "sparsity": 0.8, "update": {"freq": 10, "stop": 45}}
    sparsity = sparsify(accelerator, block, model, optimizer)
    model, optimizer = accelerator.prepare(model, optimizer)
    for _ in range(2 * steps):
        with accelerator.accumulate(model):
            x = torch.randn(32, 16, device=accelerator.device)
            loss = torch.nn.functional.mse_loss(model(x.roll(1, dims=1)), x)
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
    accelerator.save_state(folder)  # load_state(folder) brings weights, masks and the state of RigL back
    table = rarefy.summary(sparsity)
    print(table)
    return table.actual_sparsity


if __name__ == "__main__":
    main()

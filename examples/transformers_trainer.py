"""A Transformers model trained sparse by `transformers.Trainer`: pip install 'rarefy[transformers,accelerate]'."""

import torch
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments

import rarefy
from rarefy.integrations.transformers import SparsityCallback


def main(output_dir: str = "model_dir/transformers_trainer", steps: int = 60) -> float:
    """Trains on a sequence that repeats; returns the last logged loss."""
    config = GPT2Config(
        vocab_size=64, n_embd=64, n_layer=2, n_head=4, n_positions=32, bos_token_id=0, eos_token_id=0
    )
    tokens = torch.arange(32) % 7
    sparsity = SparsityCallback({"algorithm": "rigl", "sparsity": 0.9, "update": {"freq": 10, "stop": "75%"}})
    arguments = TrainingArguments(
        output_dir, max_steps=steps, learning_rate=1e-2, logging_steps=10, save_steps=steps, report_to="none"
    )
    data: list = [{"input_ids": tokens, "labels": tokens}] * 8
    trainer = Trainer(GPT2LMHeadModel(config), arguments, train_dataset=data, callbacks=[sparsity])
    trainer.train()  # resume_from_checkpoint=True goes on from the last checkpoint
    print(rarefy.summary(sparsity.sparsity))
    trainer.save_model()  # a dense model with exact zeros: from_pretrained(output_dir) loads it anywhere
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry][-1]


if __name__ == "__main__":
    main()

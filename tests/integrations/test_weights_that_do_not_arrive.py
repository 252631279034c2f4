"""A `transformers.Trainer` that resumes and finds no weight of the file in its model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from rarefy.errors import RarefyError

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from rarefy.integrations.transformers import SparsityCallback  # noqa: E402

SIZES = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}


def model() -> Any:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        **SIZES, num_key_value_heads=2, vocab_size=16, max_position_embeddings=8
    )
    return transformers.LlamaForCausalLM(config)


def trainer(folder: Path, kind: Any, steps: int, sparsity: Any = 0.75, model_init: Any = None) -> Any:
    arguments = transformers.TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        save_steps=2,
        per_device_train_batch_size=2,
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )
    ids = torch.arange(8)
    data = [{"input_ids": ids, "labels": ids}] * 8
    own = {"model": model()} if model_init is None else {"model_init": model_init}
    return kind(**own, args=arguments, train_dataset=data, callbacks=[SparsityCallback(sparsity)])


class Renaming(transformers.Trainer):
    """Loads the weights under names of which its model has only one, as versions that renamed layers do."""

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        weights = self.model.state_dict()
        name = "model.layers.0.mlp.up_proj.weight"
        self.model.load_state_dict({name: weights[name], "old." + name: weights[name]}, strict=False)


def test_it_is_said_in_one_line(tmp_path: Path) -> None:
    trainer(tmp_path, transformers.Trainer, 2).train()
    checkpoint = str(tmp_path / "checkpoint-2")
    with pytest.raises(
        RarefyError, match=r"loaded 1 of 7 sparse weights .*from_pretrained.*from_zeros"
    ) as found:
        trainer(tmp_path, Renaming, 4).train(resume_from_checkpoint=checkpoint)
    assert "\n" not in str(found.value)
    trainer(tmp_path, transformers.Trainer, 3).train(resume_from_checkpoint=checkpoint)


RISING = {"type": "linear", "init": 0.0, "slope": 0.25}
GRADUAL = {"algorithm": "gmp", "sparsity": RISING, "update": {"freq": 1}}


class Deaf(transformers.Trainer):
    """Finds none of the names of a file in its model."""

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        pass


@pytest.mark.parametrize("sparsity", [0.75, GRADUAL], ids=["static", "gmp"])
def test_a_model_of_model_init_too(sparsity: Any, tmp_path: Path) -> None:
    trainer(tmp_path, transformers.Trainer, 2, sparsity, model).train()
    checkpoint = str(tmp_path / "checkpoint-2")
    with pytest.raises(RarefyError, match="loaded 0 of 7 sparse weights"):
        trainer(tmp_path, Deaf, 4, sparsity, model).train(resume_from_checkpoint=checkpoint)
    trainer(tmp_path, transformers.Trainer, 3, sparsity, model).train(resume_from_checkpoint=checkpoint)

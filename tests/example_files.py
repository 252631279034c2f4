"""The example files, small enough for tests."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from rarefy.yaml_files.yaml_file import load_file

EXAMPLES = Path(__file__).parent.parent / "examples"
NAMES = sorted(path.name for path in EXAMPLES.glob("*.yaml"))

SMALL_GPT = {
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_heads": 4,
    "filter_size": 32,
    "max_position_embeddings": 16,
}
SMALL_HUGGING_FACE = {"n_embd": 16, "n_layer": 1, "n_head": 4, "n_positions": 16}


def load_example(name: str) -> dict[str, Any]:
    """An example as plain data."""
    return load_file(EXAMPLES / name)


def write_data(folder: Path) -> None:
    """A little text and a little HDF5 for the small examples."""
    for number in range(4):
        (folder / f"text{number}.txt").write_text("the quick brown fox jumps over the lazy dog\n" * 20)
    samples = np.random.default_rng(0).integers(0, 64, (8, 3, 16), dtype=np.int32)
    samples[:, 1] = 1
    for split in ("train", "val"):
        (folder / split).mkdir()
        with h5py.File(folder / split / "data.h5", "w") as file:
            file["data"] = samples


def shrink(content: dict[str, Any], folder: Path) -> dict[str, Any]:
    """An example with small sizes and with data from `folder`; writes to `folder/out`."""
    content = copy.deepcopy(content)
    entries = content["trainer"]
    trainers = [entry["trainer"] for entry in (entries if isinstance(entries, list) else [content])]
    folders = {}
    for number, trainer in enumerate(trainers):
        out = str(folder / "out" / str(number))
        folders[trainer["init"].get("model_dir", "")] = out
        trainer["init"]["model_dir"] = out
        _shrink_files(trainer, folders)
        _shrink_model(trainer["init"]["model"])
        trainer["init"]["loop"] = {"num_steps": 4, "eval_steps": 1}
        for key, block in trainer["fit"].items():
            if key != "ckpt_path":
                _shrink_data(block, folder)
    return content


def _shrink_files(trainer: dict[str, Any], folders: dict[str, str]) -> None:
    """Lets phases find what the small ones before them have saved."""
    if "steps" in trainer["init"].get("checkpoint", {}):
        trainer["init"]["checkpoint"] = {"steps": 2}
    if "ckpt_path" in trainer["fit"]:
        trainer["fit"]["ckpt_path"] = (
            f"{folders[trainer['fit']['ckpt_path'].rpartition('/')[0]]}/checkpoint_2"
        )
    block = trainer["init"].get("sparsity")
    method = block.get("init_method") if isinstance(block, dict) else None
    if isinstance(method, dict) and "checkpoint" in method:
        block["init_method"] = {**method, "checkpoint": folders[method["checkpoint"]]}


def _shrink_model(model: dict[str, Any]) -> None:
    if model["name"] in ("gpt2", "gpt3"):
        model.update(SMALL_GPT, vocab_size=256)
        if model["name"] == "gpt3":
            model.update(num_heads=12, hidden_size=24)
    elif "config" in model:
        model["config"].update(SMALL_HUGGING_FACE)
    else:
        model["name"] = f"{EXAMPLES}/conv_net.py:ConvNet"
        model["width"] = 4


def _shrink_data(block: dict[str, Any], folder: Path) -> None:
    name = block["data_processor"]
    if name == "TextCorpusDataProcessor":
        block.update(source=str(folder / "*.txt"), sequence_length=16, batch_size=2)
    elif name == "GptHDF5MapDataProcessor":
        block.update(data_dir=str(folder / Path(block["data_dir"]).name), batch_size=2)
    else:
        block.update(data_processor=f"{EXAMPLES}/conv_net.py:make_spots", batch_size=4, batches=4)

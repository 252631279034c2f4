"""Files that `save_pretrained` writes hold no masks, whoever made the model sparse."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from torch import nn

import rarefy

transformers = pytest.importorskip("transformers")


def gpt2() -> Any:
    sizes = {"vocab_size": 32, "n_embd": 16, "n_layer": 1, "n_head": 2}
    config = transformers.GPT2Config(**sizes, bos_token_id=0, eos_token_id=0)
    return transformers.GPT2LMHeadModel(config)


def test_without_the_callback(tmp_path: Path) -> None:
    alone, inner = gpt2(), gpt2()
    rarefy.Static(0.5).apply(alone)
    rarefy.Static(0.5).apply(nn.ModuleDict({"inner": inner}))
    for number, one in enumerate((alone, inner)):
        one.save_pretrained(tmp_path / str(number))
        saved = load_file(tmp_path / str(number) / "model.safetensors")
        assert saved and not [name for name in saved if "mask" in name]
        assert any(name.endswith("weight_mask") for name in one.state_dict())


@pytest.mark.parametrize("own", [None, set(), ["lm_head.bias"]])
def test_finalize_leaves_nothing_that_keeps_masks_out(own: Any) -> None:
    model = gpt2()
    vars(model).pop("_keys_to_ignore_on_save", None)
    if own is not None:
        model._keys_to_ignore_on_save = own
    # Twice, as each member of a group does.
    for name in ("c_fc", "c_attn"):
        rarefy.Static(0.5, param_filter=f"*.{name}.weight").apply(model)
    assert any("mask" in name for name in model._keys_to_ignore_on_save)
    rarefy.finalize(model)
    assert vars(model).get("_keys_to_ignore_on_save") is own
    assert ("_keys_to_ignore_on_save" in vars(model)) == (own is not None)

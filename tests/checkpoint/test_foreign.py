"""Checkpoints of other programs: tensors come in, code never runs."""

import os
import pickle
import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rarefy.checkpoint.error import CheckpointError
from rarefy.checkpoint.foreign import load_foreign, unwrap_names

STATE = {
    "fc.weight": torch.randn(3, 2),
    "fc.weight_mask": torch.tensor([[True, False]] * 3),
    "fc.bias": torch.ones(3),
}


def saved(path: Path, content) -> Path:
    torch.save(content, path)
    return path


@pytest.mark.parametrize("suffix", [".mdl", ".pt"])
@pytest.mark.parametrize(
    "content",
    [STATE, {"model": STATE, "optimizer": {"state": {}}, "global_step": 3}, {"state_dict": STATE}],
    ids=["plain", "model", "state_dict"],
)
def test_the_state_dict_is_found(tmp_path, suffix, content):
    loaded = load_foreign(saved(tmp_path / f"checkpoint{suffix}", content))
    assert loaded.keys() == STATE.keys()
    assert all(torch.equal(loaded[name], STATE[name]) for name in STATE)


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module."])
def test_wrapper_prefixes_are_cut_off(tmp_path, prefix):
    wrapped = {prefix + name: tensor for name, tensor in STATE.items()}
    assert load_foreign(saved(tmp_path / "a.pt", wrapped)).keys() == STATE.keys()


def test_compiled_submodules_are_recognised():
    state = {"layers.0._orig_mod.weight_mask": torch.ones(1)}
    assert list(unwrap_names(Path("a.pt"), state)) == ["layers.0.weight_mask"]


def test_names_that_the_model_really_has_stay():
    state = {"module.weight": torch.ones(1), "_orig_mod.bias": torch.ones(1)}
    assert list(unwrap_names(Path("a.pt"), state, known=["module.weight"])) == ["module.weight", "bias"]


def test_names_that_become_equal_are_refused():
    state = {"module.weight": torch.ones(1), "weight": torch.ones(1)}
    with pytest.raises(CheckpointError, match=r"a\.pt: has weight twice"):
        unwrap_names(Path("a.pt"), state)


class Exploit:
    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self):
        return os.mkdir, (str(self.target),)


@pytest.mark.parametrize(
    "wrap", [lambda exploit: exploit, lambda exploit: {"model": STATE, "extra": exploit}]
)
@pytest.mark.parametrize("use_torch", [True, False])
def test_a_crafted_pickle_does_not_run(tmp_path, wrap, use_torch):
    content, path = wrap(Exploit(tmp_path / "owned")), tmp_path / "evil.mdl"
    if use_torch:
        torch.save(content, path)
    else:
        path.write_bytes(pickle.dumps(content))
    with pytest.raises(
        CheckpointError, match=r"holds more than tensors and plain values \(loading that could run code\)"
    ):
        load_foreign(path)
    assert not (tmp_path / "owned").exists()


@pytest.mark.parametrize("content", [{}, [1], torch.ones(1), 5, {"model": {}}])
def test_a_file_without_a_state_dict_is_refused(tmp_path, content):
    with pytest.raises(CheckpointError, match="holds no state dict"):
        load_foreign(saved(tmp_path / "a.pt", content))


def test_an_entry_that_is_no_tensor_is_named(tmp_path):
    with pytest.raises(CheckpointError, match=r"fc\.count is a int, not a tensor"):
        load_foreign(saved(tmp_path / "a.pt", {**STATE, "fc.count": 3}))


@pytest.mark.parametrize("content", [b"", b"not a checkpoint at all", b"PK\x03\x04 cut short", b"\x80\x02]"])
def test_a_damaged_file_is_one_clear_line(tmp_path, content):
    path = tmp_path / "a.pt"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"a\.pt: .*; .*") as caught:
        load_foreign(path)
    assert "\n" not in str(caught.value)


@given(st.binary(max_size=60))
@settings(deadline=None, max_examples=200)
def test_no_bytes_get_past_the_one_line(content):
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "a.pt"
        path.write_bytes(content)
        with pytest.raises(CheckpointError):
            load_foreign(path)


def test_a_truncated_file_is_refused(tmp_path):
    path = saved(tmp_path / "a.pt", STATE)
    path.write_bytes(path.read_bytes()[:-300])
    with pytest.raises(CheckpointError, match="is damaged"):
        load_foreign(path)


def test_an_hdf5_file_is_named_as_such(tmp_path):
    path = tmp_path / "a.mdl"
    path.write_bytes(b"\x89HDF\r\n\x1a\n" + bytes(100))
    with pytest.raises(
        CheckpointError,
        match=r"is an HDF5 file of the Model Zoo; where cerebras.pytorch is installed, convert it with: python -c",
    ):
        load_foreign(path)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(CheckpointError, match="cannot be read: No such file"):
        load_foreign(tmp_path / "gone.pt")


def test_a_second_name_of_the_last_norm_is_the_same_parameter(tmp_path):
    gain = torch.arange(3.0)
    second = "model.transformer_decoder.norm.weight"
    path = tmp_path / "a.mdl"
    for value, kept in ((gain, False), (gain.clone(), False), (gain + 1, True)):
        torch.save({"model": {"model.ln_f.weight": gain, second: value}}, path)
        found = load_foreign(path, ["model.ln_f.weight"])
        assert (second in found) == kept
        assert torch.equal(found["model.ln_f.weight"], gain)
    assert second in load_foreign(path)
    assert second in load_foreign(path, ["model.ln_f.weight", second])

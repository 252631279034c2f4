"""Which checkpoints fit which models."""

import pytest
import torch

from rarefy.checkpoint.matching import dense_state, match_masks, match_model, without_masks

DENSE = {name: torch.arange(1.0, 3.0) for name in ("a.weight", "b.weight")}
MASK = torch.tensor([True, False])
SPARSE = {**DENSE, "a.weight_mask": MASK, "b.weight_mask": MASK}
HALF = {**DENSE, "a.weight_mask": MASK}


@pytest.mark.parametrize("state", [DENSE, SPARSE, HALF])
def test_equal_states_do_not_differ(state):
    assert not match_masks(state, state)
    assert not match_model(state, state)


def test_a_sparse_run_needs_masks():
    difference = match_masks(SPARSE, DENSE)
    assert difference and difference.missing == ("a.weight", "b.weight")
    assert difference.problem() == "is dense, but this run is sparse (a.weight, b.weight)"
    assert "--disable_strict_checkpoint_loading or --load_checkpoint_states model" in difference.remedy()
    assert "init_method" in difference.remedy()


def test_a_dense_run_refuses_masks():
    difference = match_masks(DENSE, SPARSE)
    assert difference and difference.surplus == ("a.weight", "b.weight")
    assert difference.problem() == "is sparse (a.weight, b.weight), but this run is dense"
    assert "dense weights with zeros" in difference.remedy()


def test_every_sparse_parameter_must_find_its_mask():
    difference = match_masks(SPARSE, HALF)
    assert difference.missing == ("b.weight",) and not difference.complete
    assert difference.problem() == "has no mask for b.weight"


def test_masks_on_either_side_are_both_named():
    other = {**DENSE, "b.weight_mask": MASK}
    surplus = "has masks for b.weight, dense in this run"
    assert match_masks(HALF, other).problem() == f"has no mask for a.weight and {surplus}"
    assert match_masks(HALF, SPARSE).problem() == surplus


def test_another_model_is_described():
    model = {"same": torch.ones(1), "only_model": torch.ones(1), "shape": torch.ones(2, 3)}
    checkpoint = {"same": torch.ones(1), "only_file": torch.ones(1), "shape": torch.ones(2, 4)}
    difference = match_model(model, checkpoint)
    assert difference
    assert difference.problem() == (
        "is of another model: it lacks only_model and has unknown only_file "
        "and has other shapes for shape ([2, 4] where the model has [2, 3])"
    )


def test_masks_do_not_make_another_model():
    assert not match_model(SPARSE, DENSE)
    assert not match_model(DENSE, SPARSE)


def test_long_lists_are_cut():
    model = {f"w{index}": torch.ones(1) for index in range(10)}
    assert match_model(model, {}).problem() == "is of another model: it lacks w0, w1, w2 and 7 more"


def test_a_dense_state_has_zeros_and_no_mask():
    before = {name: tensor.clone() for name, tensor in SPARSE.items()}
    dense = dense_state(SPARSE, ["a.weight"])
    assert dense["a.weight"].tolist() == [1.0, 0.0]
    assert dense.keys() == SPARSE.keys() - {"a.weight_mask"}
    assert all(torch.equal(SPARSE[name], before[name]) for name in before)


def test_inactive_nan_becomes_zero():
    state = {"w": torch.tensor([float("nan"), 1.0]), "w_mask": torch.tensor([0.0, 1.0])}
    assert dense_state(state, ["w"])["w"].tolist() == [0.0, 1.0]


def test_without_masks_leaves_weights_alone():
    assert without_masks(SPARSE).keys() == DENSE.keys()


def test_a_mask_beside_a_modules_own_is_found_by_its_other_name():
    own = torch.tensor([False, True])
    state = {**DENSE, "a.weight_mask": own, "a.weight_sparsity_mask": MASK}
    assert not match_masks(state, state) and not match_model(state, state)
    dense = dense_state(state, ["a.weight"])
    assert dense["a.weight"].tolist() == [1.0, 0.0] and dense["a.weight_mask"] is own
    assert "a.weight_sparsity_mask" not in dense and sorted(without_masks(state)) == sorted(
        [*DENSE, "a.weight_mask"]
    )

"""Names of masks, and the parameters that they belong to."""

import pytest
import torch

from rarefy.checkpoint.mask_names import free_mask_name, mask_names

WEIGHT = torch.arange(1.0, 3.0)
MASK = torch.tensor([True, False])


@pytest.mark.parametrize("own", [(), ("w_mask",), ("w_mask", "w_sparsity_mask")])
def test_the_name_that_is_free_is_the_one_that_is_found(own):
    state = {"w": WEIGHT, **dict.fromkeys(own, MASK)}
    name = free_mask_name("w", state.__contains__)
    assert name == f"w{'_sparsity' * len(own)}_mask"
    assert mask_names({**state, name: MASK}) == mask_names({name: MASK, **state}) == {"w": name}


def test_a_mask_belongs_to_a_parameter_of_its_shape():
    state = {"attention.causal_mask": torch.ones(3), "w": torch.ones(2), "w_mask": torch.ones(3)}
    assert mask_names(state) == {}
    assert mask_names({"w": WEIGHT, "w_mask": MASK, "v": WEIGHT, "v_mask": MASK}) == {
        "w": "w_mask",
        "v": "v_mask",
    }


def test_a_parameter_whose_name_ends_as_ours_do():
    assert mask_names({"w_sparsity": WEIGHT, "w_sparsity_mask": MASK}) == {"w_sparsity": "w_sparsity_mask"}

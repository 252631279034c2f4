"""Whatever is computed with a sparse weight has the value that the dense weight gives."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from rarefy.errors import RarefyError
from rarefy.tensors import SparseWeight
from sparse_weights import whole

EXPRESSIONS = {
    "plus one": lambda w: w + 1,
    "exp": torch.exp,
    "cos": torch.cos,
    "sin": torch.sin,
    "softmax": lambda w: w.softmax(-1),
    "power of zero": lambda w: w**0,
    "square": lambda w: w**2,
    "clamp away from zero": lambda w: w.clamp(0.1, 0.2),
    "clamp": lambda w: w.clamp(-0.1, 0.2),
    "where": lambda w: torch.where(w > 0, w, -1.0),
    "zeros are": lambda w: w == 0,
    "not zeros": lambda w: w != 0,
    "times dense": lambda w: w * torch.arange(8.0),
    "plus dense": lambda w: w + torch.arange(8.0),
    "three dimensions": lambda w: w * torch.ones(2, 1, 8),
    "minus itself": lambda w: w - w,
    "maximum": lambda w: torch.maximum(w, -w),
    "addcmul": lambda w: torch.addcmul(w, w, w, value=2),
    "addcmul with dense": lambda w: torch.addcmul(w, torch.ones(6, 8), torch.ones(8)),
    "addcmul into dense": lambda w: torch.addcmul(torch.ones(6, 8), w, w),
    "lerp": lambda w: torch.lerp(w, torch.ones(6, 8), 0.3),
    "number minus": lambda w: 1 - w,
    "tensor number": lambda w: w * torch.tensor(2.0) + torch.tensor(0.0),
    "plus a tensor number": lambda w: w + torch.tensor(1.0),
    "half": lambda w: w.half().float(),
    "sum": torch.sum,
    "sum of rows": lambda w: w.sum(1),
    "sum in double": lambda w: w.sum(dtype=torch.float64),
    "mean": torch.mean,
    "std": torch.std,
    "median": torch.median,
    "least of rows": lambda w: w.amin(1),
    "argmin": lambda w: w.abs().argmin(),
    "norm": torch.linalg.vector_norm,
    "norm of order one": lambda w: w.norm(p=1),
    "norm of order zero": lambda w: w.norm(p=0),
    "norm of order minus infinity": lambda w: w.norm(p=-float("inf")),
    "norm of rows": lambda w: w.norm(dim=1),
    "frobenius": torch.linalg.matrix_norm,
    "spectral": lambda w: torch.linalg.matrix_norm(w, 2),
    "quantile": lambda w: w.quantile(0.3),
    "cumsum": lambda w: w.cumsum(0),
    "boolean index": lambda w: w[w != 0],
    "transposed product": lambda w: torch.ones(3, 8) @ w.t(),
    "einsum": lambda w: torch.einsum("ij,kj->ik", w, w),
    "cat": lambda w: torch.cat([w, w]),
    "stack": lambda w: torch.stack([w, w.clone()]),
    "as an input": lambda w: F.linear(w, torch.ones(2, 8)),
    "count": torch.count_nonzero,
    "topk": lambda w: w.abs().flatten().topk(3).values,
    "isfinite": lambda w: torch.isfinite(w).all(),
    "zero-dimensional": lambda w: w[0, 1],
    "rows": lambda w: torch.stack(list(w)),
    "strided": lambda w: w.as_strided((2, 2), (8, 1)),
    "list of sums": lambda w: torch.stack(torch._foreach_add([w], 1.0)),
    "list of products": lambda w: torch.stack(torch._foreach_mul([w], [torch.arange(48.0).view(6, 8)])),
    "list of roots": lambda w: torch.stack(torch._foreach_sqrt(torch._foreach_abs([w]))),
    "list of norms": lambda w: torch.stack(torch._foreach_norm([w, torch.ones(3)], 1)),
    "list of least norms": lambda w: torch.stack(torch._foreach_norm([w], -float("inf"))),
    "numpy": lambda w: torch.from_numpy(np.asarray(w.detach()).copy()),
    "list": lambda w: torch.tensor(w.detach().tolist()),
    "quantised": lambda w: torch.quantize_per_tensor(w, 0.1, 0, torch.qint8).dequantize(),
    "to sparse": lambda w: w.to_sparse().to_dense(),
    "zeros like": torch.zeros_like,
    "ones like": torch.ones_like,
    "full like": lambda w: torch.full_like(w, 3.0),
    "new zeros": lambda w: w.new_zeros(6, 8),
    "new zeros of another shape": lambda w: w.new_zeros(3),
    "all close to itself": lambda w: torch.tensor(torch.allclose(w, w.clone())),
}


def dense_and_sparse(seed=0, density=0.4):
    generator = torch.Generator().manual_seed(seed)
    dense = torch.randn(6, 8, generator=generator)
    mask = torch.rand(6, 8, generator=generator) < density
    return dense * mask, SparseWeight.from_dense(dense, mask)


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor")
@pytest.mark.parametrize("name", EXPRESSIONS)
@pytest.mark.parametrize("density", [0.0, 0.4, 1.0])
def test_the_value_is_that_of_the_dense_weight(name, density):
    dense, sparse = dense_and_sparse(density=density)
    expected, found = EXPRESSIONS[name](dense), EXPRESSIONS[name](sparse)
    torch.testing.assert_close(whole(found), expected, equal_nan=True)


@given(
    first=st.sampled_from(["mul", "add", "sub", "div"]),
    second=st.sampled_from(["abs", "neg", "sign", "sqrt", "square", "relu", "sigmoid", "tanh"]),
    other=st.sampled_from([2.0, -0.5, "row", "itself", "other topology"]),
    seed=st.integers(0, 5),
)
def test_combinations(first, second, other, seed):
    dense, sparse = dense_and_sparse(seed)
    others = {
        "row": (torch.full((8,), 2.0),) * 2,
        "itself": (dense, sparse),
        "other topology": dense_and_sparse(seed + 9),
    }
    pair = others.get(other, (other, other))
    if first == "div" and not isinstance(pair[0], float) and other != "row":
        return  # zero divided by zero: a connection that does not exist has no value
    expected, found = (
        getattr(torch, second)(getattr(torch, first)(one, given))
        for one, given in zip((dense, sparse), pair, strict=True)
    )
    torch.testing.assert_close(whole(found), expected, equal_nan=True)


def test_results_stay_sparse_where_zeros_stay_zero():
    _, sparse = dense_and_sparse()
    for found in (
        sparse * 2,
        sparse.abs().sqrt(),
        sparse * torch.rand(8),
        sparse + sparse,
        -sparse,
        sparse.relu(),
    ):
        assert type(found) is SparseWeight and found.topology is sparse.topology
    for found in (sparse + 1, sparse.exp(), sparse + torch.rand(8)):
        assert type(found) is torch.Tensor


def test_equal_of_the_same_and_of_other_topologies():
    dense, sparse = dense_and_sparse()
    assert torch.equal(sparse, sparse.clone()) and torch.equal(sparse, dense)
    assert not torch.equal(sparse, dense_and_sparse(3)[1])


def test_dlpack_is_refused():
    _, sparse = dense_and_sparse()
    for share in (torch.from_dlpack, np.from_dlpack):
        with pytest.raises(RarefyError, match=r"no dense memory .* give its \.dense\(\)"):
            share(sparse)


@pytest.mark.parametrize("shape", [(5,), (2, 2, 2)])
def test_a_mask_is_a_bool_matrix_of_the_weights_shape(shape):
    with pytest.raises(RarefyError, match="give a bool matrix"):
        SparseWeight.from_dense(torch.ones(shape), torch.ones(shape, dtype=torch.bool))
    with pytest.raises(RarefyError, match="give a bool matrix"):
        SparseWeight.from_dense(torch.ones(2, 2), torch.ones(2, 2))
    with pytest.raises(RarefyError, match=r"give the weight's, \(2, 2\)"):
        SparseWeight.from_dense(torch.ones(2, 2), torch.ones(2, 3, dtype=torch.bool))


def test_operations_of_other_libraries_are_refused():
    @torch.library.custom_op("rarefy_test::touch", mutates_args=())
    def touch(x: torch.Tensor) -> torch.Tensor:
        return x.clone()

    with pytest.raises(
        RarefyError, match=r"rarefy_test::touch is not allowed with a sparse weight; give its \.dense"
    ):
        touch(dense_and_sparse()[1])

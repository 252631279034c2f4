"""The product with a sparse weight: values, gradients, refusals, operations counted, and Hugging Face's layout."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint_sequential
from torch.utils.flop_counter import FlopCounterMode

from rarefy.errors import RarefyError
from rarefy.tensors import Role, SparseWeight
from sparse_weights import Pair, inputs, make_sparse, whole


def gradients(model, x):
    model(x).square().mean().backward()
    return [whole(parameter.grad) for parameter in model.parameters()]


@pytest.mark.parametrize("shape", [(24,), (5, 24), (2, 3, 24), (0, 24)])
def test_values_and_gradients_of_any_batch_shape(shape):
    pair = Pair()
    x = torch.randn(shape)
    torch.testing.assert_close(*pair.run(lambda model: model(x)))
    with torch.no_grad():
        torch.testing.assert_close(*pair.run(lambda model: model(x)))
    if x.numel():
        torch.testing.assert_close(*pair.run(lambda model: gradients(model, x)))


def test_the_gradient_of_the_input():
    x = inputs(0).requires_grad_()
    torch.testing.assert_close(*Pair().run(lambda model: torch.autograd.grad(model(x).sum(), x)[0]))


def test_uses_other_than_the_product():
    pair = Pair()

    def penalised(model):
        loss = model(inputs(0)).square().mean() + 0.1 * (model[0].weight ** 2).sum()
        loss = loss + 0.1 * model[2].weight.abs().mean() + (model[4].weight @ model[2].weight).square().mean()
        loss.backward()
        return [whole(parameter.grad) for parameter in model.parameters()]

    torch.testing.assert_close(*pair.run(penalised))
    assert type(pair.sparse[2].weight.grad) is SparseWeight


def test_a_penalty_on_the_gradient():
    pair = Pair()

    def penalised(model):
        found = torch.autograd.grad(
            model(inputs(0)).square().mean(), [model[0].weight, model[4].weight], create_graph=True
        )
        sum(one.square().sum() for one in found).backward()
        return [whole(parameter.grad) for parameter in model.parameters()]

    torch.testing.assert_close(*pair.run(penalised))


def test_gradgradcheck():
    layer = nn.Linear(5, 4).double()
    make_sparse(layer.weight, torch.rand(4, 5) < 0.5)
    x = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(layer, (x,)) and torch.autograd.gradgradcheck(layer, (x,))


def test_the_dense_gradient_on_request():
    pair = Pair()
    collected = []
    weight = pair.sparse[2].weight
    weight._cell.collect = collected.append
    free = Pair().dense
    for name, parameter in free.named_parameters():
        parameter._backward_hooks = None
        parameter.data.copy_(pair.dense.get_parameter(name).data)
    for model in (free, pair.sparse):
        model(inputs(0)).square().mean().backward()
    torch.testing.assert_close(collected, [free[2].weight.grad])
    torch.testing.assert_close(whole(weight.grad), free[2].weight.grad * pair.masks["2.weight"])


def test_tied_to_an_embedding():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.embed, self.out = nn.Embedding(50, 24), nn.Linear(24, 50, bias=False)
            self.out.weight = self.embed.weight

        def forward(self, tokens):
            return self.out(self.embed(tokens).tanh())

    pair = Pair(Tied)
    assert pair.sparse.out.weight is pair.sparse.embed.weight
    for model in (pair.dense, pair.sparse):
        optimizer = torch.optim.AdamW(model.parameters(), 1e-2, fused=True)
        for _ in range(3):
            optimizer.zero_grad()
            F.cross_entropy(model(torch.arange(30)), torch.arange(30) * 7 % 50).backward()
            optimizer.step()
    pair.assert_equal()
    assert type(pair.sparse.embed.weight.grad) is SparseWeight


def test_a_weight_used_twice():
    pair = Pair()

    def twice(model):
        weight = model[2].weight
        F.linear(F.linear(torch.ones(3, 40), weight), weight).sum().backward()
        return whole(weight.grad)

    torch.testing.assert_close(*pair.run(twice))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype):
    pair = Pair()
    with torch.autocast("cpu", dtype):
        y = pair.sparse(inputs(0))
    y.float().square().mean().backward()
    expected = pair.dense(inputs(0))
    assert y.dtype == dtype and pair.sparse[0].weight.grad.dtype == torch.float32
    torch.testing.assert_close(y.float(), expected, rtol=0.05, atol=0.02)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("is_eval", [True, False])
def test_transformer_encoder_with_padding(is_eval):
    def encoder():
        torch.manual_seed(0)
        layer = nn.TransformerEncoderLayer(24, 4, 48, batch_first=True, dropout=0.0)
        return nn.TransformerEncoder(layer, 2).train(not is_eval)

    pair = Pair(encoder)
    padding = torch.zeros(3, 7, dtype=torch.bool)
    padding[:, 5:] = True
    x = torch.randn(3, 7, 24)
    with torch.set_grad_enabled(not is_eval):
        expected, found = pair.run(lambda model: model(x, src_key_padding_mask=padding))
    torch.testing.assert_close(found[:, :5], expected[:, :5])
    if not is_eval:
        for y in (expected, found):
            y[:, :5].square().mean().backward()
        for one, other in zip(pair.dense.parameters(), pair.sparse.parameters(), strict=True):
            torch.testing.assert_close(whole(other.grad), one.grad, rtol=1e-4, atol=1e-6)


def test_activation_checkpointing_and_anomaly_detection():
    pair = Pair()

    def through(model):
        with torch.autograd.set_detect_anomaly(True):
            checkpoint_sequential(model, 2, inputs(0), use_reentrant=False).square().mean().backward()
        return [whole(parameter.grad) for parameter in model.parameters()]

    torch.testing.assert_close(*pair.run(through))


# ---- refusals ----


@pytest.mark.parametrize(
    ("x", "bias", "problem"),
    [
        (torch.ones(3, 23), None, r"x: shape \(3, 23\) is not allowed; its last dimension must be 24"),
        (torch.tensor(1.0), None, r"x: shape \(\) is not allowed"),
        (torch.ones(3, 24, dtype=torch.float64), None, r"x: torch.float64 is not allowed with torch.float32"),
        (torch.ones(3, 24), torch.ones(3), r"bias: shape \(3,\) is not allowed; give \(40,\)"),
    ],
)
def test_arguments_that_do_not_fit(x, bias, problem):
    with pytest.raises(RarefyError, match=problem):
        F.linear(x, Pair().sparse[0].weight, bias)


@pytest.mark.filterwarnings("ignore:.torch.jit")
def test_torchscript_tracing_keeps_values_as_constants():
    model = Pair().sparse
    with torch.no_grad():
        traced = torch.jit.trace(model, inputs(0), check_trace=False)
        torch.testing.assert_close(traced(inputs(1)), model(inputs(1)))


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning", "ignore::FutureWarning")
def test_quantisation_aware_training():
    model = Pair().sparse.train()
    model.qconfig = torch.ao.quantization.get_default_qat_qconfig()
    prepared = torch.ao.quantization.prepare_qat(model)
    prepared(inputs(0)).square().mean().backward()
    assert type(prepared[0].weight) is SparseWeight and prepared[0].weight.grad.dense().any()


# ---- operations ----


def test_operations_are_those_that_are_computed():
    pair = Pair()
    matrices = [parameter for parameter in pair.sparse.parameters() if parameter.dim() == 2]
    forward = 2 * 16 * sum(weight.connections for weight in matrices)
    with FlopCounterMode(display=False) as counter:
        pair.sparse(inputs(0)).sum().backward()
    assert counter.get_total_flops() == 3 * forward - 2 * 16 * matrices[0].connections
    for weight in matrices:
        weight._cell.collect = lambda gradient: None
    with FlopCounterMode(display=False) as counter:
        pair.sparse(inputs(0)).sum().backward()
    dense = 2 * 16 * sum(weight.numel() for weight in matrices)
    assert counter.get_total_flops() == 2 * forward - 2 * 16 * matrices[0].connections + dense


# ---- Hugging Face's layout ----


class Conv1D(nn.Module):
    """The linear layer of GPT-2: its weight is [in, out]."""

    def __init__(self, outs, ins):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(ins, outs))
        self.bias = nn.Parameter(torch.randn(outs))

    def forward(self, x):
        flat = torch.addmm(self.bias, x.view(-1, x.size(-1)), self.weight)
        return flat.view(*x.shape[:-1], -1) + x @ self.weight


def transposed_pair():
    torch.manual_seed(0)
    dense, sparse = Conv1D(24, 40), Conv1D(24, 40)
    sparse.load_state_dict(dense.state_dict())
    mask = torch.rand(40, 24) < 0.3
    dense.weight.data.mul_(mask)
    dense.weight.register_hook(lambda grad: grad * mask)
    make_sparse(sparse.weight, mask, Role.MANAGED, is_transposed=True)
    return dense, sparse


def test_a_transposed_weight_multiplies_by_the_kernels():
    found = []
    for model in transposed_pair():
        x = torch.randn(3, 5, 40, generator=torch.Generator().manual_seed(1)).requires_grad_()
        y = model(x)
        y.square().mean().backward()
        found.append((y.detach(), x.grad, whole(model.weight.grad), model.bias.grad))
    torch.testing.assert_close(found[1], found[0])
    sparse = transposed_pair()[1]
    with FlopCounterMode(display=False) as counter:
        sparse(torch.ones(3, 5, 40))
    assert counter.get_total_flops() == 2 * 2 * 15 * sparse.weight.connections


def test_a_transposed_weight_is_a_dense_one_for_all_else():
    dense, sparse = transposed_pair()
    for use in (
        lambda w: F.linear(torch.ones(2, 24), w),
        lambda w: torch.addmm(torch.ones(2, 24), torch.ones(2, 40), w, beta=0.5),
        lambda w: w @ torch.ones(24),
        lambda w: w.t() @ torch.ones(40),
        lambda w: w[3:7].sum(0),
    ):
        torch.testing.assert_close(use(sparse.weight.detach()), use(dense.weight.detach()))
    collected = []
    sparse.weight._cell.collect = collected.append
    (torch.ones(2, 40) @ sparse.weight).sum().backward()
    assert torch.equal(collected[0], torch.full((40, 24), 2.0))

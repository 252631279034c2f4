"""Compiled and exported models with sparse weights."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import sparse_weights
from helpers import needs_changing_sizes, needs_torch
from rarefy.errors import RarefyError
from rarefy.tensors import Role, SparseWeight
from sparse_weights import Pair, inputs, masks_of, move, whole


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


class Counter:
    """A backend that counts the graphs that it is given."""

    def __init__(self):
        self.graphs = 0

    def __call__(self, graph, examples):
        self.graphs += 1
        return torch._dynamo.backends.debugging.aot_eager(graph, examples)


def learn(network, optimizer, step):
    optimizer.zero_grad()
    network(inputs(step)).square().mean().backward()
    optimizer.step()


@pytest.mark.filterwarnings("ignore:.torch.jit")  # inductor, where it is imported first
@pytest.mark.parametrize("backend", ["eager", "aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_training_a_compiled_model(backend):
    pair = Pair()
    for model in (pair.dense, pair.sparse):
        network = torch.compile(model, fullgraph=True, backend=backend) if model is pair.sparse else model
        optimizer = torch.optim.AdamW(model.parameters(), 1e-2, fused=True)
        for step in range(3):
            learn(network, optimizer, step)
    pair.assert_equal(rtol=1e-4, atol=1e-5)
    gradient = pair.sparse[0].weight.grad
    assert type(gradient) is SparseWeight and gradient.topology.equals(pair.sparse[0].weight.topology)


def test_nothing_is_compiled_again_while_the_number_of_connections_stays():
    model, counter = Pair().sparse, Counter()
    network = torch.compile(model, fullgraph=True, backend=counter)
    for step in range(4):
        torch.testing.assert_close(network(inputs(step)), model(inputs(step)))
        network(inputs(step)).sum().backward()
        for parameter in model.parameters():
            if isinstance(parameter, SparseWeight):
                move(parameter, parameter.topology.mask().roll(step + 1, 0))
    assert counter.graphs == 1


@needs_changing_sizes
@pytest.mark.parametrize("options", [{}, {"dynamic": False}], ids=["as it is", "dynamic=False"])
def test_nothing_is_compiled_again_where_the_number_of_connections_changes(options):
    # so wide that the panels change their width too
    pair, counter = Pair(lambda: nn.Sequential(nn.Linear(640, 16), nn.ReLU(), nn.Linear(16, 16))), Counter()
    model = pair.sparse
    network = torch.compile(model, fullgraph=True, backend=counter, **options)
    widths = set()
    for step in range(12):
        for number, parameter in enumerate(model.parameters()):
            if isinstance(parameter, SparseWeight):
                move(parameter, masks_of(pair.dense, 0.6 - 0.05 * step, step)[f"{2 * (number // 2)}.weight"])
        widths.add(tuple(model[0].weight.topology.label.shape[2:]))
        x = inputs(step, columns=640)
        model.zero_grad()
        model(x).square().mean().backward()
        wanted = model[0].weight.grad.dense()
        model.zero_grad()
        torch.testing.assert_close(network(x), model(x))
        network(x).square().mean().backward()
        assert model[0].weight.grad.topology.equals(model[0].weight.topology)
        torch.testing.assert_close(model[0].weight.grad.dense(), wanted)
    assert counter.graphs == 1
    assert len(widths) > 1 or model[0].weight.topology.has_blocks


def test_two_weights_with_as_many_connections_in_other_places():
    masks = [torch.eye(16, dtype=torch.bool).roll(shift, 0) for shift in (0, 8)]
    masks = [
        mask.repeat_interleave(8, 0).repeat_interleave(8, 1) for mask in masks
    ]  # whole blocks, if they are wanted
    dense = torch.randn(128, 128, generator=torch.Generator().manual_seed(0))
    first, second = (
        SparseWeight.from_dense(dense, mask, Role.MANAGED, block=sparse_weights.BLOCK) for mask in masks
    )

    def both(one, other):
        return (one * other).sum() + (one + other).square().sum()

    compiled = torch.compile(both, fullgraph=True, backend="aot_eager")
    for given in [(first, second), (first, first), (second, first)]:
        torch.testing.assert_close(compiled(*given), both(*(one.dense() for one in given)))


def test_the_label_of_a_topology_tells_where_its_memory_is():
    weight = SparseWeight.from_dense(torch.ones(16, 16), torch.eye(16, dtype=torch.bool), Role.MANAGED)
    for one in (weight, weight.share_memory_()):
        assert one.topology.label.shape[0] == one.topology.index.tensors[0].data_ptr() >> 6
    moved = weight.topology.to(torch.device("cpu"))
    assert moved.label.shape[0] == moved.index.tensors[0].data_ptr() >> 6


@needs_torch("2.8", "it does not look at what a compiled graph was made for")
def test_the_dense_gradient_is_one_more_graph():
    model, counter, collected = Pair().sparse, Counter(), []
    network = torch.compile(model, fullgraph=True, backend=counter)
    for wanted in (False, True, False, True):
        model[2].weight._cell.collect = collected.append if wanted else None
        network(inputs(0)).square().mean().backward()
    assert counter.graphs == 2 and torch.equal(*collected)
    model.zero_grad()
    model(inputs(0)).square().mean().backward()
    torch.testing.assert_close(collected[0], collected[2])


def test_other_uses_inside_the_graph():
    x = inputs(0)

    def loss(model):
        penalty = 0.1 * model[0].weight.square().sum() + (model[4].weight @ model[2].weight).square().mean()
        return model(x).square().mean() + penalty

    pair = Pair()
    torch.compile(lambda: loss(pair.sparse), fullgraph=True, backend="aot_eager")().backward()
    loss(pair.dense).backward()
    for one, other in zip(pair.dense.parameters(), pair.sparse.parameters(), strict=True):
        torch.testing.assert_close(whole(other.grad), one.grad, rtol=1e-4, atol=1e-6)


def test_autocast_inside_and_outside():
    model = Pair().sparse
    with torch.autocast("cpu", torch.bfloat16):
        y = torch.compile(model, fullgraph=True, backend="aot_eager")(inputs(0))
    y.float().square().mean().backward()
    assert y.dtype == torch.bfloat16 and model[0].weight.grad.dtype == torch.float32


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")
def test_a_compiled_optimizer_step_writes_to_the_values():
    pair = Pair()
    for model in (pair.dense, pair.sparse):
        optimizer = torch.optim.AdamW(model.parameters(), 1e-2, foreach=True)
        step = torch.compile(optimizer.step, backend="aot_eager") if model is pair.sparse else optimizer.step
        for number in range(3):
            optimizer.zero_grad()
            model(inputs(number)).square().mean().backward()
            if isinstance(model[0].weight, SparseWeight):
                model[0].weight.data_ptr()
            step()
    pair.assert_equal(rtol=1e-4, atol=1e-5)
    weight = pair.sparse[0].weight.detach()
    shown = torch.empty(0).set_(weight.untyped_storage(), 0, weight.shape)
    assert torch.equal(shown, weight.dense())


def with_another_weight(model, other, x):
    own = model[0].weight.data
    model[0].weight.data = other
    y = model(x)
    model[0].weight.data = own
    return y


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_an_assignment_to_data_in_a_compiled_function_is_refused_and_leaves_the_weight_alone(backend):
    pair = Pair()
    other = torch.ones_like(pair.dense[0].weight)
    with torch.no_grad(), pytest.raises(Exception, match=r"is not allowed on a sparse weight, .* with copy_"):
        torch.compile(with_another_weight, backend=backend)(pair.sparse, other, inputs(0))
    pair.assert_equal(rtol=0, atol=0)
    with torch.no_grad():
        torch.testing.assert_close(
            *pair.run(lambda m: with_another_weight(m, other * pair.masks["0.weight"], inputs(0)))
        )
    pair.assert_equal(rtol=0, atol=0)


def test_a_free_weight_takes_no_dense_write_in_a_compiled_function():
    weight = SparseWeight.from_dense(torch.ones(4, 4), torch.eye(4, dtype=torch.bool), Role.FREE)
    write = torch.compile(lambda one: one.copy_(torch.ones(4, 4)), backend="aot_eager")
    with pytest.raises(
        Exception, match="is not allowed in a compiled function; write before it is called"
    ) as caught:
        write(weight)
    assert RarefyError.__name__ in str(caught.value) or "RarefyError" in repr(caught.getrepr())


@needs_torch("2.10", "it cannot export tensors of a class of their own")
@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("strict", [True, False])
def test_export(strict):
    model = Pair().sparse.requires_grad_(False).eval()
    exported = torch.export.export(model, (inputs(0),), strict=strict)
    assert "rarefy.linear" in str(exported.graph)
    torch.testing.assert_close(exported.module()(inputs(1)), model(inputs(1)))
    decomposed = exported.run_decompositions()
    assert "rarefy.sparse_linear" in str(decomposed.graph)
    torch.testing.assert_close(decomposed.module()(inputs(1)), model(inputs(1)))


def test_a_compiled_layer_in_the_layout_of_conv1d():
    class Product(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(24, 8, generator=torch.Generator().manual_seed(0)))

        def forward(self, x):
            return torch.addmm(torch.ones(8), x, self.weight) + x @ self.weight

    from sparse_weights import make_sparse

    dense, sparse = Product(), Product()
    mask = masks_of(dense)["weight"]
    dense.weight.data.mul_(mask)
    make_sparse(sparse.weight, mask, is_transposed=True)
    compiled = torch.compile(sparse, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(inputs(0)), dense(inputs(0)))
    compiled(inputs(0)).square().mean().backward()
    dense(inputs(0)).square().mean().backward()
    torch.testing.assert_close(whole(sparse.weight.grad), dense.weight.grad * mask)

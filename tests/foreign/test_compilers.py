"""torch.compile, TorchScript and ONNX: right, or one line that says what to compile in its place."""

# Modules and tensors are asked for attributes that their types do not tell.
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportCallIssue=false, reportIndexIssue=false
# pyright: reportOptionalMemberAccess=false, reportOperatorIssue=false, reportFunctionMemberAccess=false
# pyright: reportOptionalSubscript=false, reportUnusedExpression=false, reportIncompatibleMethodOverride=false
# pyright: reportOptionalCall=false

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import rarefy
from foreign.networks import STATIC, inputs, network, sparse
from helpers import needs_changing_sizes, needs_torch
from rarefy.errors import RarefyError


@pytest.mark.filterwarnings("ignore:.torch.jit")
@pytest.mark.parametrize("compute", ["masked", "compact"])
@pytest.mark.parametrize("inside", [False, True])
def test_torchscript_is_refused_and_possible_once_finalized(compute, inside):
    model, *_ = sparse(STATIC, compute=compute)
    for one in (model, copy.deepcopy(model)):
        with pytest.raises(
            RarefyError, match=r"torch\.jit\.script .* rarefy\.finalize\(copy\.deepcopy\(model\)\)"
        ):
            torch.jit.script(nn.Sequential(one) if inside else one)
    dense = rarefy.finalize(copy.deepcopy(model))
    torch.testing.assert_close(torch.jit.script(dense)(inputs()), model(inputs()))
    assert not any("script" in name for name in vars(dense[0]))


@pytest.mark.filterwarnings("ignore:.torch.jit")
@pytest.mark.parametrize("compute", ["masked", "compact"])
def test_a_trace(compute):
    model, *_ = sparse(STATIC, compute=compute)
    traced = torch.jit.trace(model.eval(), inputs())
    torch.testing.assert_close(traced(inputs(3)), model(inputs(3)))


def exported(model, path, dynamo):
    torch.onnx.export(model, (inputs(),), str(path), dynamo=dynamo, verbose=False)
    session = pytest.importorskip("onnxruntime").InferenceSession(str(path))
    return torch.from_numpy(session.run(None, {session.get_inputs()[0].name: inputs().numpy()})[0])


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("compute", ["masked", "compact"])
def test_the_older_exporter_of_onnx_gets_the_dense_matrix(compute, tmp_path):
    pytest.importorskip("onnxscript")
    model, *_ = sparse(STATIC, compute=compute)
    found = exported(model.eval(), tmp_path / "model.onnx", False)
    torch.testing.assert_close(found, model(inputs()), rtol=1e-4, atol=1e-5)


@needs_torch("2.10", "it cannot export tensors of a class of their own")
@pytest.mark.filterwarnings("ignore")
def test_the_newer_exporter_of_onnx_refuses_compact_weights_in_one_line(tmp_path):
    pytest.importorskip("onnxscript")
    model, *_ = sparse(STATIC, compute="compact")
    with pytest.raises(
        Exception, match=r"torch\.onnx\.export of a weight in compact storage .*rarefy\.finalize"
    ):
        exported(model.eval(), tmp_path / "model.onnx", True)


def test_a_resized_weight_is_refused():
    for compute in ("masked", "compact"):
        model = network()
        sparsity = rarefy.configure({**STATIC, "compute": compute})
        sparsity.apply(model)
        model[0].weight = nn.Parameter(torch.ones(50, 32))
        with pytest.raises(RarefyError, match=r"has the shape \(50, 32\) now, and had \(48, 32\)"):
            sparsity.apply(torch.optim.SGD(model.parameters(), lr=0.1))


class Graphs:
    """A backend that counts the graphs that it is given."""

    def __init__(self):
        self.number = 0

    def __call__(self, graph, examples):
        self.number += 1
        return torch._dynamo.backends.debugging.aot_eager(graph, examples)


@needs_changing_sizes
@pytest.mark.parametrize("name", ["gmp", "granet"])
def test_a_compiled_model_prunes_more_often_than_torch_compiles(name):
    trained, graphs = [], Graphs()
    block = {
        "algorithm": name,
        "sparsity": [0.3 + 0.05 * i for i in range(13)],
        "update": {"freq": 1},
        "compute": "compact",
    }
    for is_compiled in (False, True):
        torch.compiler.reset()
        model, optimizer, _ = sparse(block)
        called = torch.compile(model, fullgraph=True, backend=graphs) if is_compiled else model
        connections = set()
        for step in range(12):
            optimizer.zero_grad()
            called(inputs(step)).square().mean().backward()
            optimizer.step()
            connections.add(model[0].weight.connections)
        assert len(connections) >= 12
        trained.append(model)
    assert graphs.number == 1
    for one, other in zip(*(model.state_dict().values() for model in trained), strict=True):
        torch.testing.assert_close(one, other)
    torch.compiler.reset()


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("compute", ["masked", "compact"])
def test_a_compiled_step_of_an_optimizer_is_compiled_once_a_topology(compute):
    block = {"algorithm": "set", "sparsity": 0.7, "update": {"freq": 2}, "compute": compute}
    trained, graphs, masks = [], Graphs(), set()
    for is_compiled in (False, True):
        torch.compiler.reset()
        torch.manual_seed(0)
        model = network()
        sparsity = rarefy.configure(block)
        sparsity.apply(model)
        optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9, foreach=False)
        sparsity.apply(optimizer)
        step = torch.compile(optimizer.step, backend=graphs) if is_compiled else optimizer.step
        for number in range(5):
            optimizer.zero_grad()
            model(inputs(number)).square().mean().backward()
            step()
            masks.add(model[0].weight_mask.numpy().tobytes())
        trained.append(model)
    assert len(masks) == 3
    # one for the first momentum, one that goes on with it, and one for each change
    assert graphs.number <= 2 + (len(masks) if compute == "compact" else 0)
    for one, other in zip(*(model.state_dict().values() for model in trained), strict=True):
        torch.testing.assert_close(one, other)
    torch.compiler.reset()


def forward_and_backward(model, optimizer):
    def step(x):
        optimizer.zero_grad()
        model(x).square().mean().backward()

    return [torch.compile(step, backend="aot_eager"), lambda _: optimizer.step()]


def whole_step(model, optimizer):
    def step(x):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()

    return [torch.compile(step, backend="aot_eager")]


def model_and_optimizer(model, optimizer):
    called = torch.compile(model, backend="aot_eager")
    step = torch.compile(optimizer.step, backend="aot_eager")
    return [lambda x: called(x).square().mean().backward(), lambda _: step(), lambda _: optimizer.zero_grad()]


LOOKS_AT_GRAPHS = needs_torch("2.8", "it does not look at what a compiled graph was made for")


def nothing(model, optimizer):
    return [
        lambda x: model(x).square().mean().backward(),
        lambda _: optimizer.step(),
        lambda _: optimizer.zero_grad(),
    ]


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("compute", ["masked", pytest.param("compact", marks=LOOKS_AT_GRAPHS)])
@pytest.mark.parametrize("compiled", [forward_and_backward, whole_step, model_and_optimizer])
def test_whatever_part_of_a_training_step_is_compiled(compute, compiled):
    block = {"algorithm": "rigl", "sparsity": 0.7, "update": {"freq": 2}, "compute": compute}
    trained = []
    for parts in (nothing, compiled):
        torch.compiler.reset()
        model, optimizer, sparsity = sparse(block)
        calls = parts(model, optimizer)
        for number in range(4):
            for call in calls:
                call(inputs(number))
        assert sparsity.step == 4
        trained.append(model)
    for one, other in zip(*(model.state_dict().values() for model in trained), strict=True):
        torch.testing.assert_close(one, other)
    torch.compiler.reset()

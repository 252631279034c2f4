"""The private names of torch: each test fails when torch renames one or changes what it means."""

# Modules and tensors are asked for attributes that their types do not tell.
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportCallIssue=false, reportIndexIssue=false
# pyright: reportOptionalMemberAccess=false, reportOperatorIssue=false, reportFunctionMemberAccess=false
# pyright: reportOptionalSubscript=false, reportUnusedExpression=false, reportIncompatibleMethodOverride=false
# pyright: reportOptionalCall=false

from __future__ import annotations

import contextlib
import copy
import multiprocessing
import re
import sys
import warnings
import weakref
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
from torch import nn, optim
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module
from torch.nn.utils import parametrize
from torch.optim.swa_utils import get_swa_multi_avg_fn

from helpers import needs_changing_sizes
from ranks import NEEDS_FULLY_SHARD
from rarefy import torch_private
from rarefy.torch_private import (
    ADDS_LISTS,
    COMPILED_PREFIX,
    SUBTRACTS_LISTS,
    accumulation_hooks,
    attribute,
    buffers_of,
    compiles_its_calls,
    ddp,
    forward_pre_hooks,
    has_memory,
    multiply_,
    onednn_product,
    parameters_of,
    put_first,
    remove_hooks,
    scale_in_gradients,
    set_progress,
    softmax_backward,
    times_written,
    viewed,
    was_told_to_skip,
)
from rarefy.torch_private.compiled import hold_sizes, let_sizes_change, let_sizes_go, sizes_may_change
from rarefy.torch_private.ddp import end_workers
from rarefy.torch_private.replacing import replace_content


class Owner:
    """Counts how often its hooks were called."""

    def __init__(self) -> None:
        self.calls: list[str] = []

    def before_forward(self, *_: object) -> None:
        self.calls.append("forward")

    def before_forward_with_keywords(self, *_: object) -> None:
        self.calls.append("keywords")

    def before_saving(self, *_: object) -> None:
        self.calls.append("saving")

    def after_saving(self, module: nn.Module, state: dict[str, object], *_: object) -> None:
        self.calls.append("saved")

    def before_loading(self, *_: object) -> None:
        self.calls.append("before loading")

    def after_loading(self, *_: object) -> None:
        self.calls.append("loading")

    def attach(self, module: nn.Module) -> None:
        module.register_forward_pre_hook(self.before_forward)
        module.register_forward_pre_hook(self.before_forward_with_keywords, with_kwargs=True)
        module.register_state_dict_pre_hook(self.before_saving)
        module._register_state_dict_hook(self.after_saving)  # the public one refuses methods
        module.register_load_state_dict_pre_hook(self.before_loading)
        module.register_load_state_dict_post_hook(self.after_loading)


def use(layer: nn.Module) -> None:
    """Everything that calls a hook."""
    layer(torch.ones(2))
    layer.load_state_dict(layer.state_dict())


def test_forward_pre_hooks_are_those_that_were_registered():
    layer = nn.Linear(2, 2)
    owner = Owner()
    owner.attach(layer)
    assert list(forward_pre_hooks(layer).values()) == [
        owner.before_forward,
        owner.before_forward_with_keywords,
    ]


def test_only_the_hooks_of_their_owner_are_removed():
    layer = nn.Linear(2, 2)
    gone = Owner()
    stays = Owner()
    gone.attach(layer)
    stays.attach(layer)
    remove_hooks(layer, gone)
    use(layer)
    assert gone.calls == []
    assert stays.calls == ["forward", "keywords", "saving", "saved", "before loading", "loading"]
    assert len(layer._forward_pre_hooks_with_kwargs) == 1


def test_a_module_that_compiles_its_calls_is_known():
    layer = nn.Linear(2, 2)
    assert not compiles_its_calls(layer)
    layer.compile(backend="eager")
    assert compiles_its_calls(layer)


def test_a_compiled_model_saves_names_with_the_prefix():
    compiled = torch.compile(nn.Linear(2, 2), backend="eager")
    assert list(compiled.state_dict()) == [f"{COMPILED_PREFIX}weight", f"{COMPILED_PREFIX}bias"]


def test_writes_in_place_are_counted_through_every_view():
    tensor = torch.zeros(4)
    before = times_written(tensor)
    tensor.add_(1)
    tensor[:2].mul_(3)
    assert times_written(tensor) == before + 2
    _ = tensor + 1
    assert times_written(tensor) == before + 2


def test_an_inference_tensor_counts_no_writes():
    with torch.inference_mode():
        tensor = torch.zeros(2)
        tensor.add_(1)
    assert times_written(tensor) == 0


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad])
def test_a_view_of_a_view_is_of_the_first_tensor(mode):
    weight = nn.Linear(2, 3).weight
    with mode():
        assert viewed(weight.t()[0]) is weight and viewed(weight) is weight
        copied = weight.clone()
        assert viewed(copied) is copied


def test_an_inference_tensor_is_a_view_of_none():
    with torch.inference_mode():
        view = torch.zeros(2, 3).t()
        assert viewed(view) is view


def test_hooks_after_accumulation_are_those_that_were_registered():
    weight = nn.Linear(2, 2).weight
    assert len(accumulation_hooks(weight)) == 0
    handle = weight.register_post_accumulate_grad_hook(print)
    assert list(accumulation_hooks(weight).values()) == [print]
    handle.remove()
    assert len(accumulation_hooks(weight)) == 0


def test_a_hook_that_is_put_first_is_called_first():
    weight = nn.Parameter(torch.ones(1))
    called = []
    for number in (1, 2):
        weight.register_post_accumulate_grad_hook(lambda _, number=number: called.append(number))
    first = weight.register_post_accumulate_grad_hook(lambda _: called.append(0))
    assert put_first(first)
    weight.sum().backward()
    first.remove()
    weight.sum().backward()
    assert called == [0, 1, 2, 1, 2]


def test_many_tensors_are_multiplied_in_place():
    tensors = [torch.tensor([1.0, -2.0]), torch.tensor([[4.0]], dtype=torch.bfloat16)]
    multiply_(tensors, 0.5)
    assert [tensor.tolist() for tensor in tensors] == [[0.5, -1.0], [[2.0]]]


def test_averages_of_many_tensors_subtract_and_add_lists():
    seen = []

    class Seen(torch.Tensor):
        @classmethod
        def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            seen.append(func)
            return super().__torch_function__(func, types, args, kwargs or {})

    for count in (1, torch.tensor(1)):
        average = torch.tensor([2]).as_subclass(Seen)
        with contextlib.suppress(RuntimeError):  # torch adds no fractions to whole numbers
            get_swa_multi_avg_fn()([average], [torch.tensor([4])], count)
    assert [func for func in seen if func is SUBTRACTS_LISTS or func in ADDS_LISTS] == [
        SUBTRACTS_LISTS,
        ADDS_LISTS[0],
        SUBTRACTS_LISTS,
        ADDS_LISTS[1],
    ]


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_the_gradient_of_softmax_is_that_of_autograd(dtype: torch.dtype):
    torch.manual_seed(0)
    scores = torch.randn(3, 5, dtype=dtype, requires_grad=True)
    grad = torch.randn(3, 5, dtype=dtype)
    output = scores.softmax(-1)
    (wanted,) = torch.autograd.grad(output, scores, grad)
    torch.testing.assert_close(softmax_backward(grad, output.detach()), wanted)


def test_onednn_multiplies_with_the_transpose():
    if not torch.backends.mkldnn.is_available():
        pytest.skip("torch was built without oneDNN")
    product = onednn_product()
    assert product is not None
    torch.manual_seed(0)
    x = torch.randn(7, 5)
    y = torch.randn(3, 5)
    torch.testing.assert_close(product(x, y), x @ y.t())


@pytest.mark.parametrize(("gradient", "skipped"), [(float("inf"), True), (1.0, False)])
def test_a_fused_optimizer_learns_from_its_scaler_whether_to_step_and_how_gradients_are_scaled(
    gradient: float, skipped: bool
):
    weight = nn.Parameter(torch.ones(2))
    optimizer = optim.SGD([weight], lr=0.1, fused=True)
    seen: list[tuple[bool, float]] = []

    def look(*_: object) -> None:
        scale = scale_in_gradients(optimizer)
        seen.append((was_told_to_skip(optimizer), float("nan") if scale is None else scale.item()))

    optimizer.register_step_post_hook(look)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    scaler.scale(weight.sum() * gradient).backward()
    scaler.step(optimizer)
    assert seen == [(skipped, 2.0)]
    assert not was_told_to_skip(optimizer) and scale_in_gradients(optimizer) is None


@pytest.mark.parametrize(
    ("found", "skipped"), [(torch.ones(1), True), (torch.zeros(1), False), (None, False)]
)
def test_what_a_grad_scaler_found_is_read(found: torch.Tensor | None, skipped: bool):
    optimizer = optim.SGD([nn.Parameter(torch.ones(2))], lr=0.1)
    optimizer.found_inf = found
    assert was_told_to_skip(optimizer) is skipped


def test_a_scheduler_goes_on_from_a_step_without_a_warning():
    optimizer = optim.SGD([nn.Parameter(torch.ones(1))], lr=0.1)
    scheduler = optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0 / (1 + step))
    set_progress(scheduler, 4, [0.02])
    assert scheduler.get_last_lr() == [0.02]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        scheduler.step()  # before any optimizer.step(), which a scheduler at its beginning warns of
    assert scheduler.last_epoch == 5


def test_modes_and_transforms_are_noticed():
    from torch.utils._python_dispatch import TorchDispatchMode

    assert not torch_private.has_mode()
    with TorchDispatchMode():
        assert torch_private.has_mode()
    assert not torch_private.has_transform()
    seen: list[bool] = []
    torch.func.vmap(lambda x: (seen.append(bool(torch_private.has_transform())), x)[1])(torch.ones(2))
    assert seen == [True]


def test_a_private_function_that_torch_lacks_answers_that_everything_is_watched():
    assert torch_private.private("_removed_from_torch")() is True


# ---- tensor subclasses ----


def test_batches_of_gradients_are_seen():
    x = torch.ones(3, requires_grad=True)
    seen = []
    x.register_hook(lambda grad: seen.append(torch_private.is_batched(grad)))
    torch.autograd.grad(x * 2, x, torch.eye(3), is_grads_batched=True)
    torch.autograd.grad(x * 2, x, torch.ones(3))
    assert seen == [True, False]


def test_forward_gradients_are_seen():
    assert not torch_private.has_forward_gradients()
    with torch.autograd.forward_ad.dual_level():
        assert torch_private.has_forward_gradients()


class Watched(torch.Tensor):
    """Notes what it is asked."""

    asked: ClassVar[list[object]] = []

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        cls.asked.append(func)
        return super().__torch_function__(func, types, args, kwargs)


def test_subclass_functions_are_left_out():
    tensor = torch.ones(2).as_subclass(Watched)
    Watched.asked.clear()
    with torch_private.without_subclass_functions():
        torch.neg(tensor)
    assert not Watched.asked
    torch.neg(tensor)
    assert Watched.asked


def test_a_subclass_without_functions_gives_plain_results():
    class Quiet(torch.Tensor):
        __torch_function__ = torch_private.no_subclass_functions

    assert type(torch.neg(torch.ones(2).as_subclass(Quiet))) is torch.Tensor


def test_a_wrapper_has_a_shape_and_no_memory():
    class Wrapper(torch.Tensor):
        @classmethod
        def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
            return torch.tensor(3.0)

    wrapper = torch_private.make_wrapper(Wrapper, (3, 2), dtype=torch.float64)
    assert wrapper.shape == (3, 2) and wrapper.dtype == torch.float64 and torch.ops.aten.neg(wrapper) == 3


def test_modes_are_left():
    with torch.utils.flop_counter.FlopCounterMode(display=False) as counter:
        with torch_private.without_modes():
            torch.ones(2, 2) @ torch.ones(2, 2)
            assert not torch_private.has_mode()
        assert counter.get_total_flops() == 0


def test_nested_containers():
    assert torch_private.leaves([1, {"a": (2, 3)}]) == [1, 2, 3]
    assert torch_private.mapped(lambda x: x + 1, [1, {"a": (2,)}]) == [2, {"a": (3,)}]


def test_a_function_that_is_not_compiled_may_be_traced_through():
    calls = []

    @torch_private.not_compiled
    def double(x):
        return x * 2

    def backend(graph, examples):
        calls.append(graph)
        return graph

    x = torch.ones(2)
    assert torch.equal(torch.compile(double, backend=backend)(x), 2 * x) and not calls
    assert torch.equal(torch.compile(lambda y: double(y) + 1, backend=backend, fullgraph=True)(x), 2 * x + 1)
    assert len(calls) == 1
    torch.compiler.reset()


def test_content_is_replaced_whoever_knows_the_tensor():
    layer, fired = nn.Linear(3, 2), []
    weight = layer.weight
    weight.note = "kept"
    handle = weight.register_hook(lambda grad: fired.append("gradient"))
    weight.register_post_accumulate_grad_hook(lambda parameter: fired.append(parameter.shape))
    reference, loss = weakref.ref(weight), layer(torch.ones(1, 3)).sum()
    replace_content(weight, nn.Parameter(torch.ones(4, 3, dtype=torch.float64)))
    assert layer.weight is weight is reference() and weight.shape == (4, 3) and weight.note == "kept"
    (weight * 2).sum().backward()
    assert fired == ["gradient", torch.Size([4, 3])] and torch.equal(weight.grad, torch.full_like(weight, 2))
    handle.remove()
    weight.sum().backward()
    assert fired[2:] == [torch.Size([4, 3])]
    with pytest.raises(RuntimeError, match="changed its storage, dtype or device after the forward pass"):
        loss.backward()


def test_content_of_a_frozen_tensor_is_replaced():
    weight = nn.Parameter(torch.ones(2), requires_grad=False)
    replace_content(weight, nn.Parameter(torch.zeros(3), requires_grad=False))
    assert weight.shape == (3,) and not weight.requires_grad


def test_buffers_of_is_the_dict_itself():
    layer = nn.BatchNorm1d(2)
    buffers_of(layer)["running_mean"] = torch.ones(2)
    assert layer.running_mean.tolist() == [1.0, 1.0]
    copied: list[object] = []

    class Marker:
        def __init__(self):
            self.buffers = buffers_of(layer)

        def __setstate__(self, state):
            copied.append(state["buffers"])

        def __call__(self, *_):
            """As a hook."""

    layer.register_forward_pre_hook(Marker())
    twin = copy.deepcopy(layer)
    assert copied[0] is buffers_of(twin) and "running_mean" in buffers_of(twin)


def test_zeros_that_torch_makes_believe_have_no_memory():
    assert has_memory(torch.zeros(2)) and not has_memory(torch._efficientzerotensor((2,)))


def test_an_attribute_is_what_getattr_finds():
    layer = nn.BatchNorm1d(2)
    for name in ("weight", "bias", "running_mean", "eps", "forward"):
        assert attribute(layer, name) is getattr(layer, name) or attribute(layer, name) == getattr(
            layer, name
        )
    assert attribute(layer, "missing") is None
    # A parameter that became something computed is found in its new place.
    parametrize.register_parametrization(layer, "weight", nn.Identity())
    assert torch.equal(attribute(layer, "weight"), layer.weight)
    layer.register_parameter("bias", None)
    assert attribute(layer, "bias") is None


def test_parameters_of_is_the_dict_itself():
    layer = nn.Linear(2, 2)
    weight = nn.Parameter(torch.ones(2, 2))
    parameters_of(layer)["weight"] = weight
    assert layer.weight is weight
    twin, found = copy.deepcopy((layer, parameters_of(layer)))
    assert found is parameters_of(twin) and list(found) == ["weight", "bias"]


def test_a_part_of_a_flat_parameter_is_known():
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        model = nn.Linear(2, 2)
        assert not torch_private.is_part_of_a_flat_parameter(model.weight)
        options = {"device_id": torch.device("cpu"), "use_orig_params": True}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.distributed.fsdp.FullyShardedDataParallel(model, **options)
        assert torch_private.is_part_of_a_flat_parameter(model.weight)
    finally:
        torch.distributed.destroy_process_group()


@pytest.fixture
def mesh():
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        yield init_device_mesh("cpu", (1,))
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.filterwarnings("ignore:DTensor random operators may not have complete support")  # torch 2.6
def test_a_module_that_was_distributed_by_hand_is_known(mesh):
    parallel = parallelize_module(nn.Linear(2, 2), mesh, ColwiseParallel())
    assert ddp.is_distributed_by_hand(parallel)
    parallel(torch.ones(1, 2))
    assert ddp.is_distributed_by_hand(parallel)
    assert not ddp.is_managed_by_fully_shard(parallel)


@NEEDS_FULLY_SHARD
def test_a_module_that_fully_shard_cut_is_known(mesh):
    model = nn.Sequential(nn.Linear(2, 2))
    fully_shard(model, mesh=mesh)
    assert not ddp.is_distributed_by_hand(model[0])
    model(torch.ones(1, 2))
    assert ddp.is_managed_by_fully_shard(model[0])
    assert not ddp.is_distributed_by_hand(model[0])


def test_workers_that_live_on_are_ended():
    loader = torch.utils.data.DataLoader(list(range(4)), num_workers=1, persistent_workers=True)
    assert len(list(loader)) == 4
    before = set(multiprocessing.active_children())
    assert before
    end_workers(loader)
    assert not before & set(multiprocessing.active_children())
    assert len(list(loader)) == 4
    end_workers(loader)
    end_workers([1, 2])


@needs_changing_sizes
def test_sizes_of_attributes_of_a_name_may_change():
    # Not by monkeypatch, which deletes what it has set; torch then says that there is no such setting.
    with torch.compiler.config.patch(dynamic_sources="L['x']"):
        check_that_sizes_change()


def check_that_sizes_change():
    let_sizes_change("_of_nobody_")
    let_sizes_change("_of_nobody_")
    theirs, ours = torch.compiler.config.dynamic_sources.split(",")
    assert theirs == "L['x']"
    assert re.match(ours, "L['self']._modules['0']._parameters['weight']._of_nobody_else")
    assert not re.match(ours, "L['self'].param_groups[0]['params'][0]._of_nobody_else")
    assert not re.match(ours, "L['self']._of_somebody")
    torch.compiler.reset()
    holder, graphs = SimpleNamespace(), []

    def double():
        return holder._of_nobody_values * 2

    called = torch.compile(
        double, fullgraph=True, backend=lambda graph, _: graphs.append(graph) or graph.forward
    )
    for size in (3, 4, 5):
        holder._of_nobody_values = torch.ones(size)
        assert called().tolist() == [2.0] * size
    assert len(graphs) == 1
    torch.compiler.reset()


@needs_changing_sizes
def test_whether_sizes_may_change_is_known():
    with torch.compiler.config.patch(dynamic_sources=""):
        assert not sizes_may_change("_of_nobody_")
        let_sizes_change("_of_nobody_")
        assert sizes_may_change("_of_nobody_") and not sizes_may_change("_of_somebody_")


def test_an_older_torch_keeps_sizes_fixed(monkeypatch):
    monkeypatch.setattr(torch.compiler, "config", None)
    let_sizes_change("_of_nobody_")
    # It may compile whatever it is given once its compiler is loaded.
    assert "torch._dynamo" in sys.modules and sizes_may_change("_of_nobody_")
    monkeypatch.delitem(sys.modules, "torch._dynamo")
    assert not sizes_may_change("_of_nobody_")


def test_sizes_that_are_held_are_fixed_until_they_are_let_go():
    torch.compiler.reset()
    graphs: list[object] = []
    called = torch.compile(
        lambda x: x * 2, fullgraph=True, backend=lambda graph, _: graphs.append(graph) or graph.forward
    )
    for size in (3, 4, 5, 6):
        x = torch.ones(size)
        hold_sizes([x])
        assert called(x).tolist() == [2.0] * size
    assert len(graphs) == 4
    before = dict(vars(x))
    let_sizes_go([x])
    assert before and not vars(x)
    torch.compiler.reset()


def test_what_a_graph_says_of_changing_sizes_is_forgotten():
    torch.compiler.reset()
    x = torch.ones(3, requires_grad=True)
    torch._dynamo.mark_dynamic(x, 0)
    y = torch.compile(lambda x: x.sin() + 1, backend="aot_eager")(x).detach_()
    assert any("dynamic_indices" in name for name in vars(y))
    hold_sizes([y])
    assert not any("dynamic_indices" in name for name in vars(y))
    torch.compiler.reset()

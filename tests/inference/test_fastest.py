"""A sparse model in its fastest form: what it computes, what it says, and that it is not trained."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

import rarefy
from rarefy.errors import RarefyError
from rarefy.inference import fastest
from rarefy.inference.trial import speed_up
from rarefy.kernels import instruction_set
from rarefy.kernels.instruction_sets import REFERENCE
from rarefy.tensors import SparseWeight

needs_kernels = pytest.mark.skipif(instruction_set() == REFERENCE, reason="needs the compiled kernels")


class Net(nn.Module):
    """Layers of every kind that matters here."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(20, 32)
        self.conv = nn.Conv1d(32, 32, 3, padding=1)
        self.layers = nn.ModuleList(nn.Linear(32, 32) for _ in range(3))
        self.head = nn.Linear(32, 20, bias=False)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.conv(self.embedding(ids).transpose(1, 2)).transpose(1, 2)
        for layer in self.layers:
            x = torch.relu(layer(x))
        return self.head(x)


IDS = torch.arange(10).view(2, 5)


def sparse_net(sparsity: float = 0.75) -> Net:
    torch.manual_seed(0)
    net = Net()
    rarefy.configure(sparsity).apply(net)
    return net


def forms(found: fastest.Compacted) -> dict[str, str]:
    return {layer.name: layer.form for layer in found.layers}


@needs_kernels
@pytest.mark.parametrize("state", ["attached", "finalized", "loaded"])
def test_outputs_stay_and_each_weight_has_its_form(state: str) -> None:
    net = sparse_net()
    if state != "attached":
        rarefy.finalize(net)
    if state == "loaded":
        other = Net()
        other.load_state_dict(net.state_dict())
        net = other
    expected = net.eval()(IDS)
    found = rarefy.compact(net, form="compact")
    torch.testing.assert_close(net(IDS), expected, atol=1e-6, rtol=1e-5)
    linear = {f"layers.{n}.weight": "compact" for n in range(3)} | {"head.weight": "compact"}
    assert forms(found) == {"conv.weight": "dense"} | linear
    assert all(isinstance(layer.weight, SparseWeight) and type(layer) is nn.Linear for layer in net.layers)
    assert not [name for name, _ in net.named_buffers()]


@needs_kernels
def test_it_says_what_it_chose_and_why() -> None:
    net: Any = rarefy.finalize(sparse_net())
    net.layers[0].weight.data[:] = 1.0  # no zeros any longer, so there is nothing to say of it
    found = rarefy.compact(net, form="compact")
    assert "layers.0.weight" not in forms(found)
    [conv] = [layer for layer in found.layers if layer.name == "conv.weight"]
    assert conv.reason == "its module is a Conv1d, not an nn.Linear itself"
    assert (conv.shape, round(conv.sparsity, 2)) == ((32, 32, 3), 0.75)
    text = str(found)
    assert "asked for" in text and "Conv1d" in text and "head.weight" in text
    assert "<td>head.weight</td>" in found._repr_html_()
    assert repr(found) == "Compacted(block=0, compact=3, dense=1)"


@needs_kernels
@pytest.mark.parametrize(
    ("ratio", "form", "reason"),
    [
        (2.04, "compact", "2.0 times faster with 1 token"),
        (1.04, "dense", "compact would be 1.0 times as fast with 1 token"),
    ],
)
def test_a_trial_decides_for_weights_of_one_kind(
    ratio: float, form: str, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried: list[int] = []

    def trial(dense: Any, sparse: Any, tokens: int) -> float:
        tried.append(len(dense))
        assert all(torch.equal(one, other.dense()) for one, other in zip(dense, sparse, strict=True))
        return ratio

    monkeypatch.setattr(fastest, "speed_up", trial)
    found = rarefy.compact(sparse_net())
    assert sorted(tried) == [1, 3]
    linear = [layer for layer in found.layers if layer.name != "conv.weight"]
    assert {(layer.form, layer.reason) for layer in linear} == {(form, reason)}
    assert "layers.*.weight (3)" in str(found)


def blocks_net(block: tuple[int, int] = (16, 8)) -> Net:
    torch.manual_seed(0)
    net = Net()
    pattern = {"block": list(block)}
    rarefy.configure({"sparsity": 0.75, "param_filter": "layers.*.weight", "pattern": pattern}).apply(net)
    return net


def kept_as(net: Any) -> list[str]:
    return ["block" if layer.weight.topology.has_blocks else "compact" for layer in net.layers]


@needs_kernels
def test_whole_blocks_are_kept_as_blocks() -> None:
    net: Any = rarefy.finalize(blocks_net()).eval()
    expected = net(IDS)
    before = copy.deepcopy(net.state_dict())
    found = rarefy.compact(net, form="compact")
    assert forms(found) == {f"layers.{n}.weight": "block" for n in range(3)}
    assert repr(found) == "Compacted(block=3, compact=0, dense=0)"
    assert kept_as(net) == ["block"] * 3 and net.layers[0].weight.topology.block == (16, 8)
    torch.testing.assert_close(net(IDS), expected, atol=1e-6, rtol=1e-5)
    copied = copy.deepcopy(net)
    net.load_state_dict(rarefy.finalize(sparse_net()).state_dict())  # connections, which are no blocks
    torch.testing.assert_close(net(IDS), sparse_net().eval()(IDS), atol=1e-6, rtol=1e-5)
    plain = rarefy.finalize(copied).state_dict()
    assert all(torch.equal(plain[name], one) for name, one in before.items())


@needs_kernels
@pytest.mark.parametrize(
    ("of_blocks", "of_connections", "form", "reason"),
    [
        (3.0, 2.0, "block", "3.0 times faster with 1 token"),
        (2.0, 3.0, "compact", "3.0 times faster with 1 token"),
        (1.0, 0.5, "dense", "block would be 1.0 times as fast with 1 token"),
    ],
)
def test_the_trial_decides_between_blocks_and_connections(
    of_blocks: float, of_connections: float, form: str, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def trial(dense: Any, sparse: Any, tokens: int) -> float:
        return of_blocks if sparse[0].topology.has_blocks else of_connections

    monkeypatch.setattr(fastest, "speed_up", trial)
    net = blocks_net()
    found = rarefy.compact(net)
    assert {(layer.form, layer.reason) for layer in found.layers} == {(form, reason)}
    if form != "dense":
        assert kept_as(net) == [form] * 3


def test_a_trial_reads_the_clock_in_turns() -> None:
    ticks = iter(range(1000))
    weights = [torch.eye(4), torch.eye(4)]
    sparse = [SparseWeight.from_dense(one, one != 0) for one in weights]
    # a reading before and one after: every pass takes one tick
    assert speed_up(weights, sparse, 1, clock=lambda: float(next(ticks))) == 1.0
    assert next(ticks) == 4 + 4 * 5


@needs_kernels
def test_the_number_of_tokens_reaches_the_trial(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fastest, "speed_up", lambda dense, sparse, tokens: float(tokens))
    assert "64.0 times faster with 64 tokens" in str(rarefy.compact(sparse_net(), tokens=64))


def test_a_dense_model_is_left_as_it_is() -> None:
    net = Net()
    net.conv.weight.data.view(-1)[:10] = 0
    found = rarefy.compact(net)
    assert found.layers == () and not net.training
    net.train()(IDS).sum().backward()


@needs_kernels
def test_training_is_refused_until_it_is_finalized() -> None:
    net = sparse_net()
    net.layers[1].bias.requires_grad_(False)
    rarefy.compact(net, form="compact")
    with pytest.raises(RarefyError, match=r"is not trained; call model.eval\(\) .*rarefy.finalize\(model\)"):
        net.train()(IDS)
    with torch.no_grad():
        net(IDS)
    # in evaluation mode gradients reach what is dense, and no weight with zeros
    net.eval()(IDS).sum().backward()
    assert net.head.weight.grad is None and net.embedding.weight.grad is not None
    rarefy.finalize(net).train()(IDS).sum().backward()
    assert net.head.weight.grad is not None and type(net.head.weight) is nn.Parameter
    assert not net.layers[1].bias.requires_grad
    assert round(float((net.head.weight == 0).float().mean()), 2) == 0.75


@needs_kernels
def test_twice_is_once() -> None:
    net = sparse_net()
    first = rarefy.compact(net, form="compact")
    assert rarefy.compact(net, form="compact") == first
    assert len(net._forward_pre_hooks) == 1


@needs_kernels
def test_files_and_copies_hold_what_they_held() -> None:
    net: Any = rarefy.finalize(sparse_net())
    before = copy.deepcopy(net.state_dict())
    rarefy.compact(net, form="compact")
    after = net.state_dict()
    assert list(after) == list(before)
    for name, tensor in before.items():
        assert torch.equal(
            after[name].dense() if isinstance(after[name], SparseWeight) else after[name], tensor
        )
    copied = copy.deepcopy(net)
    torch.testing.assert_close(copied(IDS), net(IDS))
    with pytest.raises(RarefyError, match="is not trained"):
        copied.train()(IDS)
    other = sparse_net(0.5)
    net.load_state_dict(rarefy.finalize(other).state_dict())
    torch.testing.assert_close(net(IDS), other.eval()(IDS), atol=1e-6, rtol=1e-5)


def test_a_dtype_without_a_kernel_stays_dense() -> None:
    net = rarefy.finalize(sparse_net()).double()
    found = rarefy.compact(net, form="compact")
    assert "there is no kernel for float64 here" in {layer.reason for layer in found.layers}
    assert set(forms(found).values()) == {"dense"}


@needs_kernels
def test_bfloat16() -> None:
    net = rarefy.finalize(sparse_net()).bfloat16().eval()
    expected = net(IDS)
    assert "compact" in forms(rarefy.compact(net, form="compact")).values()
    torch.testing.assert_close(net(IDS), expected, atol=0.02, rtol=0.05)


@pytest.mark.parametrize("tokens", [0, -1, 1.5, True, "1"])
def test_tokens_are_a_whole_number(tokens: Any) -> None:
    with pytest.raises(RarefyError, match=r"tokens: .* is not allowed; give a whole number"):
        rarefy.compact(nn.Linear(2, 2), tokens=tokens)


def test_the_form_is_one_of_two() -> None:
    with pytest.raises(RarefyError, match="form: 'masked' is not allowed; give 'auto' or 'compact'"):
        rarefy.compact(nn.Linear(2, 2), form="masked")  # pyright: ignore[reportArgumentType]


@needs_kernels
@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_models_of_transformers_generate_the_same_tokens(kind: str, tmp_path: Any) -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    tokens = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
    model: Any
    if kind == "gpt2":
        config = transformers.GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=2, **tokens)
        model = transformers.GPT2LMHeadModel(config)
    else:
        sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
        config = transformers.LlamaConfig(vocab_size=64, **sizes, **tokens)
        model = transformers.LlamaForCausalLM(config)
    rarefy.configure(0.8).apply(model)
    rarefy.finalize(model)
    model.save_pretrained(tmp_path / "sparse")
    loaded = type(model).from_pretrained(tmp_path / "sparse")
    ids = torch.arange(1, 6).view(1, 5)

    def generated() -> torch.Tensor:
        return loaded.generate(ids, max_new_tokens=8, min_new_tokens=8, do_sample=False)

    with torch.no_grad():
        logits = loaded(ids).logits
        expected = generated()
        found = rarefy.compact(loaded, form="compact")
        assert len(found.layers) == (8 if kind == "gpt2" else 14)
        assert set(forms(found).values()) == {"compact"}
        torch.testing.assert_close(loaded(ids).logits, logits, atol=1e-5, rtol=1e-5)
        assert torch.equal(generated(), expected)
    loaded.save_pretrained(tmp_path / "again")
    again = type(model).from_pretrained(tmp_path / "again")
    assert all(torch.equal(one, again.state_dict()[name]) for name, one in model.state_dict().items())

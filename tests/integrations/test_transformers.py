"""`transformers.Trainer`: the same masks and losses as the plain loop, resume, saving and loading."""

from __future__ import annotations

import copy
import json
import os
import socket
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import rarefy
from helpers import assert_exact_zeros, assert_identical, sparse_parameters
from rarefy.errors import ConfigError, RarefyError
from rarefy.tensors import SparseWeight

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from rarefy.integrations.transformers import SparsityCallback, decode_state, encode_state  # noqa: E402

STEPS, VOCABULARY = 14, 32
STATIC = {"sparsity": 0.75, "seed": 3}
RIGL = {"algorithm": "rigl", "sparsity": 0.75, "seed": 3, "update": {"freq": 3, "stop": 11}}
SPARSITY = {"static": STATIC, "rigl": RIGL}
GMP_SCHEDULE = {"type": "polynomial", "init": 0.0, "final": 0.9, "start": 0, "stop": 20}
GMP = {"algorithm": "gmp", "sparsity": GMP_SCHEDULE, "update": {"freq": 5}}


def gpt2():
    sizes = {"n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 8, "vocab_size": VOCABULARY}
    quiet = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "bos_token_id": 0, "eos_token_id": 0}
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes, **quiet))


def small_sizes(**more):
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
    return {**sizes, **more}


def llama():
    sizes = small_sizes(vocab_size=VOCABULARY, num_key_value_heads=1, max_position_embeddings=8)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes))


def bert():
    sizes = small_sizes(vocab_size=VOCABULARY, max_position_embeddings=8)
    quiet = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    return transformers.BertForSequenceClassification(transformers.BertConfig(**sizes, **quiet, num_labels=2))


def vit():
    sizes = small_sizes(image_size=8, patch_size=4, num_channels=1)
    return transformers.ViTForImageClassification(transformers.ViTConfig(**sizes, num_labels=2))


MODELS = {"gpt2": gpt2, "llama": llama, "bert": bert, "vit": vit}


def make(kind):
    torch.manual_seed(0)
    return MODELS[kind]()


def samples(kind, count):
    generator = torch.Generator().manual_seed(1)
    found = []
    for _ in range(count):
        tokens = torch.randint(VOCABULARY, (8,), generator=generator)
        label = torch.randint(2, (), generator=generator)
        if kind == "vit":
            found.append({"pixel_values": torch.randn(1, 8, 8, generator=generator), "labels": label})
        else:
            labels = label if kind == "bert" else torch.cat([torch.tensor([-100]), tokens[1:]])
            found.append({"input_ids": tokens, "labels": labels})
    return found


class InOrder(transformers.Trainer):
    """A Trainer that does not shuffle."""

    def _get_train_sampler(self, *_):
        return torch.utils.data.SequentialSampler(self.train_dataset)


class Losses(transformers.TrainerCallback):
    """Keeps what is logged, as a TensorBoard callback would see it."""

    def __init__(self):
        self.logs = []

    def on_log(self, args, state, control, logs, **_):
        self.logs.append(dict(logs))


def trainer_of(
    folder, model, kind, callback, accumulate=1, optimizers=(None, None), model_init=None, **arguments
):
    options = {
        "output_dir": str(folder), "max_steps": STEPS, "per_device_train_batch_size": 2, "use_cpu": True,
        "gradient_accumulation_steps": accumulate, "optim": "adamw_torch", "learning_rate": 1e-2,
        "logging_steps": 1, "save_strategy": "no", "report_to": "none", "disable_tqdm": True,
        "dataloader_pin_memory": False, **arguments,
    }  # fmt: skip
    data = samples(kind, 2 * accumulate * STEPS)
    callbacks = [] if callback is None else [callback]
    return InOrder(
        model=model,
        model_init=model_init,
        args=transformers.TrainingArguments(**options),
        train_dataset=data,
        eval_dataset=data[:2],
        callbacks=[*callbacks, Losses()],
        optimizers=optimizers,
    )


def losses_of(trainer):
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def plain_loop(model, kind, config, accumulate=1, dtype=None):
    sparsity = rarefy.configure(config)
    sparsity.apply(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0)
    sparsity.apply(optimizer)
    scheduler = transformers.get_linear_schedule_with_warmup(optimizer, 0, STEPS)
    data, losses = samples(kind, 2 * accumulate * STEPS), []
    model.train()
    for step in range(STEPS):
        total = 0.0
        for micro in range(accumulate):
            first = 2 * (accumulate * step + micro)
            batch = torch.utils.data.default_collate(data[first : first + 2])
            with torch.autocast("cpu", dtype=dtype or torch.bfloat16, enabled=dtype is not None):
                loss = model(**batch).loss / accumulate
            loss.backward()
            total += float(loss.detach())
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        losses.append(total)
    return sparsity, losses


def masks_of(sparsity):
    return {parameter.name: parameter.mask.clone() for parameter in sparse_parameters(sparsity)}


def assert_same_run(sparsity, losses, other_sparsity, other_losses, tolerance=1e-5):
    assert len(losses) == len(other_losses) == STEPS
    assert losses == pytest.approx(other_losses, rel=tolerance)
    assert_identical(masks_of(sparsity), masks_of(other_sparsity))
    assert sparsity.step == other_sparsity.step == STEPS


# ---- the same run as the plain loop ----


@pytest.mark.parametrize("algorithm", SPARSITY)
@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("compute", ["masked", "compact"])
def test_the_trainer_does_what_the_plain_loop_does(compute, kind, algorithm, tmp_path):
    # In one storage: another one adds up in another order, and which connection grows may hang on a last digit.
    config = {**SPARSITY[algorithm], "compute": compute}
    callback = SparsityCallback(config)
    trainer = trainer_of(tmp_path, make(kind), kind, callback)
    first = masks_of(callback.sparsity)
    trainer.train()
    moved = any(not torch.equal(mask, first[name]) for name, mask in masks_of(callback.sparsity).items())
    assert moved == (algorithm == "rigl")
    assert_same_run(callback.sparsity, losses_of(trainer), *plain_loop(make(kind), kind, config))
    assert_exact_zeros(callback.sparsity, trainer.optimizer.optimizer)


@pytest.mark.parametrize("compute", ["masked", "compact"])
def test_gradients_are_accumulated_as_in_the_plain_loop(compute, tmp_path):
    callback = SparsityCallback({**RIGL, "compute": compute})
    trainer = trainer_of(tmp_path, make("gpt2"), "gpt2", callback, accumulate=2)
    trainer.train()
    expected = plain_loop(make("gpt2"), "gpt2", RIGL, accumulate=2)
    assert_same_run(callback.sparsity, losses_of(trainer), *expected)


def test_bfloat16(tmp_path):
    callback = SparsityCallback(RIGL)
    trainer = trainer_of(tmp_path, make("gpt2"), "gpt2", callback, bf16=True)
    trainer.train()
    expected = plain_loop(make("gpt2"), "gpt2", RIGL, dtype=torch.bfloat16)
    assert_same_run(callback.sparsity, losses_of(trainer), *expected, tolerance=1e-3)


def test_an_optimizer_of_ones_own(tmp_path):
    callback, model = SparsityCallback(RIGL), make("gpt2")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0)
    trainer = trainer_of(tmp_path, model, "gpt2", callback, optimizers=(optimizer, None))
    trainer.train()
    assert_same_run(callback.sparsity, losses_of(trainer), *plain_loop(make("gpt2"), "gpt2", RIGL))


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
def test_torch_compile(tmp_path):
    torch.compiler.reset()
    callback, backend = SparsityCallback(RIGL), {"torch_compile": True, "torch_compile_backend": "aot_eager"}
    trainer = trainer_of(tmp_path, make("gpt2"), "gpt2", callback, **backend)
    trainer.train()
    assert_same_run(callback.sparsity, losses_of(trainer), *plain_loop(make("gpt2"), "gpt2", RIGL))


def work(rank, port, folder):
    """One of two processes, each with half of every batch."""
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2")
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    callback = SparsityCallback({key: value for key, value in RIGL.items() if key != "seed"})
    args = {"per_device_train_batch_size": 1, "save_strategy": "steps", "save_steps": 7, "seed": 3}
    trainer = trainer_of(folder, make("gpt2"), "gpt2", callback, **args)
    trainer.train()
    second = SparsityCallback(RIGL)
    resumed = trainer_of(folder, make("gpt2"), "gpt2", second, **args)
    resumed.train(resume_from_checkpoint=f"{folder}/checkpoint-7")
    assert_identical(snapshot_of(trainer), snapshot_of(resumed))
    torch.save((masks_of(callback.sparsity), losses_of(trainer)), f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_two_processes_train_as_one(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(work, args=(port, str(tmp_path)), nprocs=2)
    sparsity, expected = plain_loop(make("gpt2"), "gpt2", RIGL)
    for rank in range(2):
        masks, losses = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        assert losses == pytest.approx(expected, rel=1e-4)
        assert_identical(masks, masks_of(sparsity))


def test_a_second_trainer_goes_on_with_the_same_callback(tmp_path):
    callback, model = SparsityCallback(RIGL), make("gpt2")
    trainer_of(tmp_path, model, "gpt2", callback, max_steps=3).train()
    sparsity = callback.sparsity
    trainer_of(tmp_path, model, "gpt2", callback, max_steps=2).train()
    assert callback.sparsity is sparsity and sparsity.step == 5


# ---- resume ----


def snapshot_of(trainer):
    found = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    for index, state in trainer.optimizer.state_dict()["state"].items():
        found |= {f"{index}.{key}": torch.as_tensor(value).clone() for key, value in state.items()}
    return found


def make_noisy():
    """A GPT-2 with dropout, so that a resumed run needs the random state too."""
    model = make("gpt2")
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.1
    return model


@pytest.fixture
def no_warnings(caplog):
    yield
    texts = [record.getMessage() for record in caplog.records if record.levelname in ("WARNING", "ERROR")]
    assert not [text for text in texts if "mask" in text or "unexpected" in text.lower()]


@pytest.mark.parametrize("elsewhere", [False, True], ids=["same folder", "moved"])
@pytest.mark.parametrize("algorithm", SPARSITY)
@pytest.mark.parametrize("compute", ["masked", "compact"])
@pytest.mark.usefixtures("no_warnings")
def test_a_resumed_run_is_the_uninterrupted_run(compute, algorithm, elsewhere, tmp_path):
    """Step 15 is an update step: connections that were just grown are zero, and active."""
    config = {**SPARSITY[algorithm], "compute": compute}
    whole = SparsityCallback(config)
    trainer = trainer_of(tmp_path / "whole", make_noisy(), "gpt2", whole, save_strategy="steps", save_steps=7)
    trainer.train()
    folder = tmp_path / "whole" / "checkpoint-7"
    if elsewhere:
        folder = folder.rename(tmp_path / "moved")
    second = SparsityCallback({**config, "seed": 99})
    resumed = trainer_of(tmp_path / "whole", make_noisy(), "gpt2", second)
    resumed.train(resume_from_checkpoint=str(folder))
    assert_identical(snapshot_of(trainer), snapshot_of(resumed))
    assert_same_run(whole.sparsity, losses_of(trainer), second.sparsity, losses_of(resumed), tolerance=0)
    assert_exact_zeros(second.sparsity, resumed.optimizer.optimizer)


@pytest.mark.parametrize("storages", [("masked", "compact"), ("compact", "masked"), ("compact", "auto")])
def test_a_run_goes_on_with_another_storage(storages, tmp_path):
    callbacks = [SparsityCallback({**RIGL, "compute": compute}) for compute in storages]
    first = trainer_of(tmp_path, make("gpt2"), "gpt2", callbacks[0], save_strategy="steps", save_steps=7)
    first.train()
    second = trainer_of(tmp_path, make("gpt2"), "gpt2", callbacks[1])
    second.train(resume_from_checkpoint=str(tmp_path / "checkpoint-7"))
    assert_same_run(callbacks[0].sparsity, losses_of(first), callbacks[1].sparsity, losses_of(second))


def test_compact_weights_decay_as_weights_do(tmp_path):
    model = make("gpt2")
    trainer = trainer_of(
        tmp_path, model, "gpt2", SparsityCallback({**RIGL, "compute": "compact"}), weight_decay=0.1
    )
    decayed, plain = trainer.create_optimizer().param_groups
    sparse = {parameter for parameter in model.parameters() if isinstance(parameter, SparseWeight)}
    assert sparse and sparse <= set(decayed["params"]) and not sparse & set(plain["params"])


def test_nothing_is_saved_but_json_and_tensors(tmp_path):
    callback = SparsityCallback(RIGL)
    trainer = trainer_of(tmp_path, make("gpt2"), "gpt2", callback, max_steps=4, save_strategy="steps")
    plain = trainer_of(tmp_path / "plain", make("gpt2"), "gpt2", None, max_steps=4, save_strategy="steps")
    trainer.train()
    plain.train()
    folder, other = tmp_path / "checkpoint-4", tmp_path / "plain" / "checkpoint-4"
    assert sorted(file.name for file in folder.iterdir()) == sorted(file.name for file in other.iterdir())
    saved = json.loads((folder / "trainer_state.json").read_text())["stateful_callbacks"]["rarefy"]
    assert saved == encode_state(callback.sparsity.state_dict())
    assert (saved["state"]["step"], saved["tensors"]) == (4, "")


def test_tensors_of_a_state_go_through_json_unchanged():
    gradient = torch.randn(3, 2).to(torch.bfloat16)
    state = [{"step": 2, "dense_gradients": {"a.weight": gradient}}, {"betas": (float("inf"), None)}]
    back = decode_state(json.loads(json.dumps(encode_state(state))))
    assert torch.equal(back[0]["dense_gradients"].pop("a.weight"), gradient)
    assert back == [{"step": 2, "dense_gradients": {}}, {"betas": (float("inf"), None)}]


@pytest.mark.parametrize("resumes", [False, True])
def test_model_init(resumes, tmp_path):
    """The Trainer builds a fresh model in `train`, after its own `__init__` ended, and loads weights into it."""
    first, saving = SparsityCallback(RIGL), {"save_strategy": "steps", "save_steps": 3}
    expected = trainer_of(tmp_path, make_noisy(), "gpt2", first, max_steps=8, **saving)
    expected.train()
    callback = SparsityCallback({**RIGL, "seed": 99 if resumes else RIGL["seed"]})
    trainer = trainer_of(tmp_path, None, "gpt2", callback, max_steps=8, model_init=make_noisy)
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3") if resumes else None)
    assert callback.sparsity.step == 8
    if resumes:
        assert_identical(masks_of(first.sparsity), masks_of(callback.sparsity))
        torch.testing.assert_close(snapshot_of(expected), snapshot_of(trainer), rtol=1e-5, atol=1e-7)
    assert_exact_zeros(callback.sparsity, trainer.optimizer.optimizer)


@pytest.mark.usefixtures("no_warnings")
def test_the_best_model_comes_back_with_its_own_masks(tmp_path):
    callback, model = SparsityCallback(GMP), make("gpt2")
    arguments = {"save_strategy": "steps", "eval_strategy": "steps", "save_steps": 4, "eval_steps": 4}
    best = {"load_best_model_at_end": True, "metric_for_best_model": "rank", "greater_is_better": True}
    trainer = trainer_of(tmp_path, model, "gpt2", callback, max_steps=12, **arguments, **best)
    ranks = iter([3, 2, 1])
    trainer.compute_metrics = lambda _: {"rank": next(ranks)}
    trainer.train()
    folder = Path(trainer.state.best_model_checkpoint)
    assert folder.name == "checkpoint-4"
    saved = load_file(folder / "model.safetensors")
    assert all(torch.equal(model.state_dict()[name], weight) for name, weight in saved.items())
    assert all(parameter.actual_sparsity == 0 for parameter in sparse_parameters(callback.sparsity))


# ---- saving and loading ----


@pytest.mark.parametrize("shard", ["1GB", "4KB"])
@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("compute", ["masked", "compact"])
def test_a_saved_model_loads_as_a_dense_one(compute, kind, shard, tmp_path, caplog):
    callback, model = SparsityCallback({**RIGL, "compute": compute, "update": {"freq": 2}}), make(kind)
    trainer_of(tmp_path, model, kind, callback, max_steps=2).train()
    model.save_pretrained(tmp_path / "saved", max_shard_size=shard)
    caplog.clear()
    dense, info = type(model).from_pretrained(tmp_path / "saved", output_loading_info=True)
    assert not caplog.records and not info["unexpected_keys"] and not info["missing_keys"]
    assert set(dense.state_dict()) == set(make(kind).state_dict())
    for parameter in sparse_parameters(callback.sparsity):
        weight = dense.get_parameter(parameter.name).detach()
        assert torch.equal(weight, parameter.dense_weight()) and not weight[~parameter.mask].any()
    batch = torch.utils.data.default_collate(samples(kind, 2))
    tolerance = 0.0 if compute == "masked" else 1e-5
    torch.testing.assert_close(dense(**batch).loss, model.eval()(**batch).loss, rtol=tolerance, atol=0.0)


def test_masks_stay_in_the_state_dict_of_the_model(tmp_path):
    model = make("gpt2")
    callback = SparsityCallback(STATIC)
    trainer_of(tmp_path, model, "gpt2", callback)
    names = {name for name in model.state_dict() if name.endswith("_mask")}
    assert names == {f"{parameter.name}_mask" for parameter in sparse_parameters(callback.sparsity)}


def test_copies_of_the_model_carry_masks_too(tmp_path):
    model = make("gpt2")
    trainer_of(tmp_path, model, "gpt2", SparsityCallback(STATIC))
    twin = copy.deepcopy(model)
    state = {name: value for name, value in twin.state_dict().items() if not name.endswith("_mask")}
    twin.load_state_dict(state)
    assert_identical(dict(model.state_dict()), dict(twin.state_dict()))


def test_a_model_that_is_not_from_transformers(tmp_path):
    class Small(nn.Module):
        def __init__(self):
            super().__init__()
            self.table, self.head = nn.Embedding(VOCABULARY, 8), nn.Linear(8, 2)

        def forward(self, input_ids, labels):
            logits = self.head(self.table(input_ids).mean(1))
            return {"loss": nn.functional.cross_entropy(logits, labels)}

    callback = SparsityCallback(RIGL)
    trainer = trainer_of(
        tmp_path, Small(), "bert", callback, max_steps=6, save_steps=3, save_strategy="steps"
    )
    trainer.train()
    second = SparsityCallback(RIGL)
    resumed = trainer_of(tmp_path / "more", Small(), "bert", second, max_steps=6)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert_identical(snapshot_of(trainer), snapshot_of(resumed))


# ---- logs ----


def test_sparsity_is_in_the_logs(tmp_path):
    callback = SparsityCallback(RIGL, log_parameters=True)
    trainer = trainer_of(tmp_path, make("gpt2"), "gpt2", callback, max_steps=2)
    trainer.train()
    later = next(one for one in trainer.callback_handler.callbacks if isinstance(one, Losses))
    parameter = sparse_parameters(callback.sparsity)[0]
    for logs in (trainer.state.log_history[0], later.logs[0]):
        assert logs["sparsity/transformer.h.0.*/target"] == 0.75
        assert logs["sparsity/model/actual"] == 0.75
        assert logs[f"sparsity/{parameter.name}/actual"] == parameter.actual_sparsity
    assert "sparsity/model/actual" not in trainer.state.log_history[-1]


def test_single_parameters_are_logged_on_demand_only(tmp_path):
    trainer = trainer_of(tmp_path, make("gpt2"), "gpt2", SparsityCallback(RIGL), max_steps=1)
    trainer.train()
    names = [name for name in trainer.state.log_history[0] if name.startswith("sparsity/")]
    assert names == ["sparsity/transformer.h.0.*/target", "sparsity/model/actual"]


# ---- what is refused ----


def test_a_dense_checkpoint(tmp_path):
    trainer_of(tmp_path, make("gpt2"), "gpt2", None, max_steps=2, save_strategy="steps").train()
    trainer = trainer_of(tmp_path, make("gpt2"), "gpt2", SparsityCallback(RIGL), max_steps=4)
    with pytest.raises(
        RarefyError, match="saved without SparsityCallback; load its model with from_pretrained"
    ):
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))


def test_a_checkpoint_of_another_algorithm(tmp_path):
    trainer_of(
        tmp_path, make("gpt2"), "gpt2", SparsityCallback(RIGL), max_steps=2, save_strategy="steps"
    ).train()
    trainer = trainer_of(tmp_path, make("gpt2"), "gpt2", SparsityCallback(STATIC), max_steps=4)
    with pytest.raises(RarefyError, match="this sparsity state is of rigl, not of static"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))


def test_dense_weights_that_come_too_late(tmp_path):
    model = make("gpt2")
    trainer = trainer_of(tmp_path, model, "gpt2", SparsityCallback(RIGL), max_steps=2)
    model.load_state_dict(make("gpt2").state_dict(), strict=False)
    with pytest.raises(RarefyError, match="loaded after the Trainer was built; load them before"):
        trainer.train()


def test_a_callback_without_a_trainer():
    with pytest.raises(RarefyError, match="give it to a Trainer"):
        _ = SparsityCallback(RIGL).sparsity


def test_an_algorithm_object_with_model_init(tmp_path):
    callback = SparsityCallback(rarefy.RigL(0.75))
    trainer = trainer_of(tmp_path, None, "gpt2", callback, max_steps=2, model_init=make_noisy)
    with pytest.raises(RarefyError, match="give SparsityCallback a dict, not an algorithm"):
        trainer.train()


@pytest.mark.parametrize(
    ("sharding", "launched", "named"),
    [
        ({"fsdp": True, "fsdp_config": {"version": 1}}, {}, "fsdp_config.version: 1"),
        ({"fsdp": True, "fsdp_config": {"xla": True}}, {}, "fsdp_config.xla"),
        ({"deepspeed": {"zero_optimization": {}}}, {}, "deepspeed"),
        ({}, {"ACCELERATE_USE_DEEPSPEED": "true"}, "deepspeed"),
        ({}, {"ACCELERATE_USE_FSDP": "true"}, "FSDP_VERSION=1"),
    ],
)
def test_weights_in_flat_tensors_are_refused(sharding, launched, named, monkeypatch):
    for name, value in launched.items():
        monkeypatch.setenv(name, value)
    args = SimpleNamespace(**{"fsdp": None, "fsdp_config": None, "deepspeed": None, **sharding})
    with pytest.raises(RarefyError, match=f"^{named} is not allowed with SparsityCallback"):
        SparsityCallback(RIGL).on_init_end(args, None, None, model=make("gpt2"))


@pytest.mark.parametrize("launched", [False, True])
def test_under_fsdp2_the_model_is_sparse_when_training_begins(launched, monkeypatch):
    given = {
        "fsdp": not launched,
        "fsdp_config": {"version": 2},
        "deepspeed": None,
        "max_steps": 8,
        "seed": 1,
    }
    if launched:
        monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
        monkeypatch.setenv("FSDP_VERSION", "2")
    model = make("gpt2")
    callback = SparsityCallback(RIGL)
    callback.on_init_end(SimpleNamespace(**given), None, None, model=model)
    assert not [name for name, _ in model.named_buffers() if name.endswith("_mask")]
    # What the block has wrong is said at once.
    with pytest.raises(ConfigError, match="sparsity: 90 is not allowed"):
        SparsityCallback(90).on_init_end(SimpleNamespace(**given), None, None, model=model)


def test_percentages_need_the_number_of_steps(tmp_path):
    config = {"algorithm": "set", "sparsity": 0.75, "update": {"freq": 2, "stop": "50%"}}
    known = SparsityCallback(config)
    trainer_of(tmp_path, make("gpt2"), "gpt2", known, max_steps=8)
    given = SparsityCallback(config, num_steps=8)
    trainer_of(tmp_path, make("gpt2"), "gpt2", given, max_steps=-1)
    assert [leaf.sparsity.update_schedule(4) for leaf in (known, given)] == [False, False]
    assert [leaf.sparsity.update_schedule(2) for leaf in (known, given)] == [True, True]
    with pytest.raises(ConfigError, match="a percentage needs the length of the run, num_steps="):
        trainer_of(tmp_path, make("gpt2"), "gpt2", SparsityCallback(config), max_steps=-1)

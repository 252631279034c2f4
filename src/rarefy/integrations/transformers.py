"""Sparse training with `transformers.Trainer`."""

from __future__ import annotations

import base64
import os
from collections.abc import Mapping
from typing import Any

import safetensors.torch
from torch import nn
from torch.optim import Optimizer

from rarefy.algorithms.base import Sparsifier
from rarefy.checkpoint import nested
from rarefy.checkpoint.tensor_file import encode_tensors, snapshot
from rarefy.config import configure
from rarefy.distributed import whole
from rarefy.errors import RarefyError
from rarefy.imports import require
from rarefy.integrations.accelerate import unwrapped_optimizer
from rarefy.integrations.metrics import sparsity_metrics
from rarefy.integrations.signed_zeros import carry_masks
from rarefy.storage.optimizer_state import saved_indices
from rarefy.storage.saved_state import KEY

TrainerCallback: Any = require("transformers", "transformers").TrainerCallback
STATE_KEY = "rarefy"


class SparsityCallback(TrainerCallback):
    """Makes the model of a `transformers.Trainer` sparse.

    Masks and exact zeros are there as soon as the Trainer is built. `save_pretrained` writes a dense model with zeros,
    without masks, that loads anywhere; the Trainer's own checkpoints resume with the same masks, and with the state of
    the algorithm in their `trainer_state.json`.

    Args:
        config: a `sparsity:` block, or a ready-made algorithm; see `rarefy.configure`.
        num_steps: optimizer steps of the run, if `config` has percentages and the arguments no `max_steps`.
        log_parameters: whether the sparsity of every single parameter is logged too.

    Raises:
        ConfigError: anything in `config` that is not allowed, once the Trainer is built.
        RarefyError: from the Trainer, if the run shards its weights in another way than FSDP2, resumes from a dense
            checkpoint, or resumes and the weights of the checkpoint did not arrive in the model.

    Example:
        >>> from transformers import BertConfig, BertModel, TrainingArguments
        >>> small = {"hidden_size": 8, "intermediate_size": 16, "num_attention_heads": 2, "num_hidden_layers": 1}
        >>> model, callback = BertModel(BertConfig(**small)), SparsityCallback(0.75)
        >>> callback.on_init_end(TrainingArguments("out", use_cpu=True), None, None, model=model)
        >>> int(model.encoder.layer[0].intermediate.dense.weight_mask.sum())
        32
    """

    def __init__(self, config: Any, *, num_steps: int | None = None, log_parameters: bool = False) -> None:
        self.config = config
        self.num_steps = num_steps
        self.log_parameters = log_parameters
        self._sparsity: Sparsifier | None = None
        self._model: nn.Module | None = None
        self._optimizer: Optimizer | None = None
        self._untrained: dict[str, float] = {}
        self._taken: set[str] = set()  # sparse weights that were loaded into the model

    @property
    def sparsity(self) -> Sparsifier:
        """The algorithms, for `rarefy.summary` and hooks.

        Raises:
            RarefyError: no Trainer has been built yet.
        """
        if self._sparsity is None:
            raise RarefyError(
                "SparsityCallback has no model yet; give it to a Trainer as one of its callbacks"
            )
        return self._sparsity

    # ---- events ----

    def on_init_end(self, args: Any, state: Any, control: Any, **objects: Any) -> None:
        """Makes the model sparse before the Trainer builds its optimizer."""
        _refuse_sharding(args)
        if _cuts_later(args):
            # Only after this are there the pieces of which masks are made; what is not allowed is said at once.
            self._sparsity = self._configured(args)
            return
        if objects["model"] is not self._model:
            self._begin(args, objects["model"])
        if objects.get("optimizer") is not None:
            self._follow(unwrapped_optimizer(objects["optimizer"]), None)

    def on_train_begin(self, args: Any, state: Any, control: Any, **objects: Any) -> None:
        """Takes back the state of a checkpoint that the Trainer loaded, and follows the optimizer."""
        saved = state.stateful_callbacks.get(STATE_KEY)
        loaded = None if saved is None else decode_state(saved)
        model = objects["model"]
        if saved is None and state.global_step > 0:
            raise RarefyError(
                "the checkpoint was saved without SparsityCallback; load its model with from_pretrained and build "
                "a new Trainer, which prunes it by init_method"
            )
        if model is not self._model:
            self._begin_anew(args, model, loaded)
        elif saved is not None:
            self._check_that_weights_arrived()
        if saved is None and self._untrained:
            self._refuse_other_weights()
        self._untrained = {}
        self._follow(unwrapped_optimizer(objects["optimizer"]), loaded)
        if loaded is not None:
            self.sparsity.load_state_dict(loaded)

    def on_step_end(self, args: Any, state: Any, control: Any, **objects: Any) -> None:
        """Puts the state of the algorithms where the Trainer's next checkpoint finds it."""
        # After every step, as no event comes before a checkpoint is written.
        state.stateful_callbacks[STATE_KEY] = encode_state(self.sparsity.state_dict())

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any], **objects: Any) -> None:
        """Adds the sparsity to the Trainer's training logs."""
        if "loss" in logs:
            metrics = sparsity_metrics(self.sparsity, every_parameter=self.log_parameters)
            logs.update(metrics)
            # The history already holds a copy of `logs`.
            state.log_history[-1].update(metrics)

    # ---- the model ----

    def _configured(self, args: Any) -> Sparsifier:
        num_steps = self.num_steps or (args.max_steps if args.max_steps > 0 else None)
        return configure(self.config, num_steps=num_steps, seed=args.seed)

    def _begin(self, args: Any, model: nn.Module) -> None:
        self._sparsity = self._configured(args)
        self.sparsity.apply(model)
        self._model = model
        self._optimizer = None
        self._untrained = self._actual()
        # Checkpoints of a model in pieces are loaded into one that is dense yet, where masks would be unknown.
        self._taken = carry_masks(model, list(self._untrained), leaves_out=_cuts_later(args))

    def _begin_anew(self, args: Any, model: nn.Module, state: Any) -> None:
        """Makes sparse what `model_init` made, or FSDP2 cut; weights that the Trainer loaded keep their topology."""
        if isinstance(self.config, Sparsifier) and (self._model is not None or not _cuts_later(args)):
            raise RarefyError(
                "model_init makes a model per training; give SparsityCallback a dict, not an algorithm"
            )
        # `_begin` is about to prune them by a first mask of its own.
        weights = {name: weight.detach().clone() for name, weight in model.named_parameters()}
        self._begin(args, model)
        if state is not None:
            # The signs of its zeros bring back the masks.
            model.load_state_dict(weights, strict=False)
            self._taken &= self._with_zeros(state)
            self._check_that_weights_arrived()

    def _with_zeros(self, state: Any) -> set[str]:
        """The sparse weights that may come from a checkpoint: those that lack zeros never were in one."""
        actual = self._actual()
        targets = [one["target_sparsity"] for one in (state if isinstance(state, list) else [state])]
        if not any(actual.values()) and any(targets):
            return set()
        return {name for name, first in self._untrained.items() if actual[name] > 0 or first == 0}

    def _follow(self, optimizer: Optimizer, loaded: Any) -> None:
        """Follows an optimizer that the Trainer may have built, and given the state of a checkpoint, just before."""
        if optimizer is self._optimizer:
            return
        # Before the hooks of `apply`: as the checkpoint had it.
        raw = optimizer.state_dict()
        if loaded is not None:
            # Entries without their topology are refused, which `apply` cannot know; it comes with them below.
            optimizer.state.clear()
        self.sparsity.apply(optimizer)
        self._optimizer = optimizer
        if loaded is not None:
            optimizer.load_state_dict({**raw, KEY: self._topology(optimizer, loaded)})

    def _topology(self, optimizer: Optimizer, loaded: Any) -> dict[int, int]:
        """The entry that torch drops from a state dict when it loads one without rarefy's hooks."""
        indices = saved_indices(optimizer)
        states = loaded if isinstance(loaded, list) else [loaded]
        kinds = {name: kind for state in states for name, kind in state["storage"].items()}
        weights = [one for leaf in self.sparsity.algorithms for one in leaf.parameters.values()]
        return {
            indices[one.weight]: one.storage.fingerprint
            for one in weights
            if kinds.get(one.name) == "compact" and one.weight in indices
        }

    def _actual(self) -> dict[str, float]:
        leaves = self.sparsity.algorithms
        return {name: one.actual_sparsity for leaf in leaves for name, one in leaf.parameters.items()}

    def _check_that_weights_arrived(self) -> None:
        """The Trainer may find no name of a file in its model, and train on with what the model was built with."""
        missing = [name for name in self._untrained if name not in self._taken]
        if missing:
            raise RarefyError(
                f"the Trainer loaded {len(self._taken)} of {len(self._untrained)} sparse weights of the checkpoint "
                f"({missing[0]} is missing), whose names in the file are not the model's; load the model with "
                "from_pretrained(checkpoint) and give it to a new Trainer with init_method: from_zeros"
            )

    def _refuse_other_weights(self) -> None:
        if self._untrained != self._actual():
            raise RarefyError(
                "weights of another sparsity were loaded after the Trainer was built; load them before, so that "
                "SparsityCallback can prune them"
            )


def _refuse_sharding(args: Any) -> None:
    """Refuses what cuts weights in other ways than `fully_shard`.

    Raises:
        RarefyError: DeepSpeed, FSDP1, or FSDP of XLA.
    """
    config = args.fsdp_config or {}
    asked = {
        "deepspeed": bool(args.deepspeed) or _launched_with("ACCELERATE_USE_DEEPSPEED"),
        "fsdp_config.xla": bool(args.fsdp and config.get("xla")),
        "fsdp_config.version: 1": bool(args.fsdp) and int(config.get("version", 2)) != 2,
        "FSDP_VERSION=1": not args.fsdp and _is_launched_cut() and os.environ.get("FSDP_VERSION", "1") != "2",
    }
    found = next((name for name, is_asked in asked.items() if is_asked), None)
    if found is not None:
        raise RarefyError(
            f"{found} is not allowed with SparsityCallback, as it mixes weights in flat tensors; train with DDP, or "
            'with FSDP2: fsdp=True, fsdp_config={"version": 2}'
        )


def _cuts_later(args: Any) -> bool:
    """Whether the Trainer has the model cut when training begins, after which it has other parameters."""
    return bool(args.fsdp) or _is_launched_cut()


def _is_launched_cut() -> bool:
    """Whether `accelerate launch` asked for FSDP, of which the arguments tell nothing."""
    return _launched_with("ACCELERATE_USE_FSDP")


def _launched_with(name: str) -> bool:
    return os.environ.get(name, "").lower() in ("1", "true", "yes", "on")


def encode_state(state: Any) -> dict[str, Any]:
    """A state dict as JSON: plain values as they are, tensors as the text of a safetensors file.

    Example:
        >>> encode_state({"step": 5})
        {'state': {'step': 5}, 'tensors': ''}
    """
    skeleton, named = nested.split(state)
    tensors = {name: whole(tensor) for name, tensor in named.items()}
    data = b"".join(encode_tensors(snapshot(tensors))) if tensors else b""
    return {"state": skeleton, "tensors": base64.b64encode(data).decode()}


def decode_state(saved: Mapping[str, Any]) -> Any:
    """The state dict that `encode_state` made.

    Example:
        >>> decode_state(encode_state({"betas": (0.9, float("inf"))}))
        {'betas': (0.9, inf)}
    """
    data = base64.b64decode(saved["tensors"])
    return nested.join(saved["state"], safetensors.torch.load(data) if data else {})

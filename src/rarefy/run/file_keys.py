"""The mappings that a configuration file is made of: their keys, types and defaults."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    GetJsonSchemaHandler,
    WithJsonSchema,
    model_validator,
)

from rarefy.checkpoint.directory import CheckpointConfig
from rarefy.distributed import ParallelConfig
from rarefy.errors import ConfigError
from rarefy.run.sparsity_schema import sparsity_schema
from rarefy.trainer.plan import LoggingConfig, LoopConfig
from rarefy.trainer.precision import PrecisionConfig
from rarefy.validation import shorten


def _as_list(value: Any) -> Any:
    return value if isinstance(value, list) or value is None else [value]


def _lower(value: Any) -> Any:
    return value.lower() if isinstance(value, str) else value


def _as_maps(value: Any) -> Any:
    """A map of several entries as a list of one-key maps."""
    return [{name: options} for name, options in value.items()] if isinstance(value, dict) else value


OneKeyMap = Annotated[dict[str, dict[str, Any] | None], Field(min_length=1, max_length=1)]
OneKeyMaps = Annotated[
    list[OneKeyMap],
    BeforeValidator(_as_maps, json_schema_input_type=list[OneKeyMap] | dict[str, dict[str, Any] | None]),
]


class OpenBlock(BaseModel):
    """A mapping with keys of its own beside the ones here."""

    # Built on first use, here and in other blocks: an import must not wait for schemas that nobody asks for.
    model_config = ConfigDict(extra="allow", frozen=True, defer_build=True)

    @model_validator(mode="before")
    @classmethod
    def _check_keys(cls, given: Any) -> Any:
        for key in given if isinstance(given, dict) else ():
            if not isinstance(key, str):
                raise ConfigError("", f"the key {shorten(key)}", "words as keys", f'"{key}": ...')
        return given


class Block(OpenBlock):
    """A mapping of the file: unknown keys are errors, an empty key (`loop:`) counts as absent."""

    model_config = ConfigDict(extra="forbid", frozen=True, defer_build=True)

    @model_validator(mode="before")
    @classmethod
    def _drop_empty(cls, given: Any) -> Any:
        # There null says something: start from no checkpoint, the newest one not either.
        keep = ("ckpt_path", "ckpt_paths")
        if not isinstance(given, dict):
            return given
        return {key: value for key, value in given.items() if value is not None or key in keep}


def _name_or_folder(schema: dict[str, Any]) -> None:
    """A folder says the name itself, which is filled in before a block is checked."""
    schema.pop("required", None)
    schema["anyOf"] = [{"required": ["name"]}, {"required": ["from_hf"]}]


class ModelBlock(OpenBlock):
    """`model`: a registered model or an import path, with its options.

    Args:
        name: of the model; left out beside `from_hf`.
        from_hf: a Hugging Face folder to take sizes and weights from; other keys go before what it says.
    """

    model_config = ConfigDict(json_schema_extra=_name_or_folder)

    name: Annotated[
        str, Field(min_length=1, description="a model's name or import path", examples=["gpt2"], strict=True)
    ]
    from_hf: Annotated[
        str | None,
        Field(min_length=1, description="the path of a Hugging Face folder, or null", examples=["./llama"]),
    ] = None

    @property
    def options(self) -> dict[str, Any]:
        """All keys but the name."""
        return dict(self.model_extra or {})


class DataBlock(OpenBlock):
    """`train_dataloader`, `val_dataloader`: a data processor by name or import path, with its options."""

    data_processor: Annotated[
        str,
        Field(
            min_length=1,
            strict=True,
            description="a data processor's name or import path",
            examples=["TextCorpusDataProcessor"],
        ),
    ]

    @property
    def options(self) -> dict[str, Any]:
        """The whole block as plain data."""
        return self.model_dump()


class BackendBlock(Block):
    """`backend`: accepted for files written for the Model Zoo; keys of the cluster are ignored.

    Args:
        backend_type: where to compute, as `device`; used where `device` is `auto`.
    """

    model_config = ConfigDict(json_schema_extra={"additionalProperties": True})

    backend_type: Annotated[
        Literal["cpu", "gpu", "csx", "auto"],
        BeforeValidator(_lower),
        WithJsonSchema({"enum": ["CPU", "GPU", "CSX", "cpu", "gpu", "csx", "auto"]}),
        Field(description="cpu, gpu, csx or auto", examples=["cpu"]),
    ] = "auto"


class _SparsityForms:
    """The JSON schema of `sparsity:`, made when one is asked for: no run needs the options of all methods."""

    @classmethod
    def __get_pydantic_json_schema__(cls, _: Any, __: GetJsonSchemaHandler) -> dict[str, Any]:
        return sparsity_schema()


class InitBlock(Block):
    """`trainer.init`: everything that the trainer is made of.

    Args:
        model: what is trained.
        device: where to compute; `auto` takes a GPU where there is one.
        backend: the Model Zoo's way to say `device`.
        model_dir: where logs and checkpoints go.
        optimizer: what trains it.
        schedulers: what changes the learning rate.
        precision: number formats, loss scaling and clipping of gradients.
        sparsity: which weights become sparse, how much and how; see the guide.
        parallel: how several processes train the model.
        loop: how long the run is, and when it validates.
        checkpoint: when the state is saved, and what is loaded.
        logging: how often, and how much, is said.
        callbacks: what else happens during the run.
        loggers: who gets the metrics.
        seed: of everything random: weights, masks, order of data, dropout.
    """

    model: ModelBlock = Field(
        description="a mapping with `name` and the model's options", examples=["{name: gpt2}"]
    )
    device: Annotated[
        Literal["cpu", "gpu", "cuda", "mps", "csx", "auto"],
        BeforeValidator(_lower),
        WithJsonSchema({"enum": ["auto", "cpu", "gpu", "cuda", "mps", "csx", "CPU", "GPU", "CSX"]}),
        Field(description="cpu, gpu or auto", examples=["auto"]),
    ] = "auto"
    backend: BackendBlock | None = Field(
        default=None, description="a mapping with `backend_type`", examples=["{backend_type: CPU}"]
    )
    model_dir: Annotated[
        str, Field(min_length=1, strict=True, description="a directory", examples=["./model_dir"])
    ] = "./model_dir"
    optimizer: OneKeyMap | None = Field(
        default=None,
        description="a mapping of one optimizer to its options",
        examples=["{AdamW: {lr: 1.0e-3}}"],
    )
    schedulers: OneKeyMaps = Field(
        default=[],
        description="a list of maps from one scheduler to its options",
        examples=[
            "[{CosineDecayLR: {initial_learning_rate: 1.0e-3, end_learning_rate: 0.0, total_iters: 100}}]"
        ],
    )
    precision: PrecisionConfig | None = Field(
        default=None, description="a mapping of precision options", examples=["{enabled: true}"]
    )
    # Checked by `configure`, which knows the options of users' own classes.
    sparsity: Annotated[Any, _SparsityForms] = Field(
        default=None, description="a number, a mapping or a list of mappings", examples=[0.9]
    )
    parallel: ParallelConfig | None = Field(
        default=None, description="a mapping of parallel options", examples=["{strategy: ddp}"]
    )
    loop: LoopConfig | None = Field(
        default=None, description="a mapping of loop options", examples=["{num_steps: 1000}"]
    )
    checkpoint: CheckpointConfig | None = Field(
        default=None, description="a mapping of checkpoint options", examples=["{steps: 100}"]
    )
    logging: LoggingConfig = Field(
        default=LoggingConfig(), description="a mapping of logging options", examples=["{log_steps: 10}"]
    )
    callbacks: OneKeyMaps = Field(
        default=[],
        description="a list of maps from one callback to its options",
        examples=["[{LogSparsity: {}}]"],
    )
    loggers: OneKeyMaps = Field(
        default=[],
        description="a list of maps from one logger to its options",
        examples=["[{CSVLogger: {}}]"],
    )
    seed: Annotated[
        int | None, Field(strict=True, ge=0, lt=2**63, description="a whole number ≥ 0", examples=[1])
    ] = None

    @property
    def requested_device(self) -> str:
        """What `device` or `backend` asks for: cpu, gpu, cuda, mps, csx or auto."""
        return self.backend.backend_type if self.backend and self.device == "auto" else self.device


Paths = Annotated[
    list[Annotated[str, Field(min_length=1, strict=True)]],
    BeforeValidator(_as_list, json_schema_input_type=str | list[str]),
]
DataBlocks = Annotated[
    list[DataBlock], BeforeValidator(_as_list, json_schema_input_type=DataBlock | list[DataBlock])
]
_CKPT_PATH = Field(
    default=None,
    min_length=1,
    description="the path of a checkpoint, or null for none",
    examples=["./model_dir/checkpoint_100"],
)
_DATA = "a mapping with `data_processor` and its options"
_DATA_EXAMPLE = "{data_processor: TextCorpusDataProcessor, source: python_stdlib, batch_size: 8}"


class FitBlock(Block):
    """`trainer.fit`: what to train on, what to validate on, where to start from.

    Args:
        train_dataloader: the data to train on.
        val_dataloader: the data to validate on; none, one or several.
        ckpt_path: where to begin; left out, the newest checkpoint of `model_dir`; null, none.
    """

    train_dataloader: DataBlock = Field(description=_DATA, examples=[_DATA_EXAMPLE])
    val_dataloader: DataBlocks = Field(
        default=[], description=f"{_DATA}, or a list of them", examples=[_DATA_EXAMPLE]
    )
    ckpt_path: str | None = _CKPT_PATH


class ValidateBlock(Block):
    """`trainer.validate`: one validation.

    Args:
        val_dataloader: the data.
        ckpt_path: whose weights; left out, the newest checkpoint; null, the weights as they are.
    """

    val_dataloader: DataBlock = Field(description=_DATA, examples=[_DATA_EXAMPLE])
    ckpt_path: str | None = _CKPT_PATH


class ValidateAllBlock(Block):
    """`trainer.validate_all`: several checkpoints on several data sets.

    Args:
        val_dataloaders: the data sets.
        ckpt_paths: the checkpoints; left out, the newest one.
    """

    val_dataloaders: DataBlocks = Field(description=f"{_DATA}, or a list of them", examples=[_DATA_EXAMPLE])
    ckpt_paths: Paths | None = Field(
        default=None,
        description="a path, a glob or a list of them",
        examples=["./model_dir/checkpoint_*"],
    )


class TrainerBlock(Block):
    """`trainer`: one trainer and what it does.

    Args:
        init: everything that the trainer is made of.
        fit: training.
        validation: one validation; in a file its name is `validate`.
        validate_all: several checkpoints on several data sets.
    """

    init: InitBlock = Field(description="a mapping with `model` and more", examples=["{model: {name: gpt2}}"])
    fit: FitBlock | None = Field(
        default=None, description="a mapping with `train_dataloader`", examples=["{train_dataloader: {...}}"]
    )
    # Not `validate`, which is a method of pydantic's models.
    validation: ValidateBlock | None = Field(
        default=None,
        alias="validate",
        description="a mapping with `val_dataloader`",
        examples=["{val_dataloader: {...}}"],
    )
    validate_all: ValidateAllBlock | None = Field(
        default=None, description="a mapping with `val_dataloaders`", examples=["{val_dataloaders: [...]}"]
    )


class TrainerEntry(Block):
    """One element of a list of trainers."""

    trainer: TrainerBlock = Field(description="a mapping with `init`", examples=["{init: {...}}"])


class File(Block):
    """A whole configuration file."""

    trainer: TrainerBlock | list[TrainerEntry] = Field(
        description="a mapping with `init`, or a list of `trainer:` mappings",
        examples=["{init: {...}, fit: {...}}"],
    )

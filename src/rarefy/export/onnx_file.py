"""Models as ONNX, through torch's exporter."""

from __future__ import annotations

import copy
import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rarefy.algorithms.attachment.keeper import finalize
from rarefy.checkpoint.manifest import write_file
from rarefy.errors import RarefyError
from rarefy.export.job import Fill, Job
from rarefy.export.output import check_free, write
from rarefy.models.call import ModelCall
from rarefy.models.gpt import GPTModel
from rarefy.models.hugging_face import HuggingFaceCausalModel

# torch's exporter takes sizes of 1 as fixed, and equal ones for the same.
EXAMPLE_SHAPE = (3, 5)
TOKENS = {0: "batch", 1: "sequence"}


def onnx(job: Job) -> Fill:
    """An ONNX file; the first dimension of every input (of token ids the second too) may have any size.

    Language models take `input_ids` and give `logits`. Any other model takes and gives what it does in
    training, as the first batch of the training data shows.

    Raises:
        RarefyError: the extra is not installed, the model cannot be built, or torch cannot export it.
    """
    _require_exporter()
    content = _to_onnx(_interface(job))
    return lambda path: write_file(path, [content])


def to_onnx(
    model: nn.Module, inputs: Mapping[str, Tensor], out: str | Path, outputs: Sequence[str] = ("output",)
) -> None:
    """Writes a model as an ONNX file, sparse or not, in any storage; the model itself stays as it is.

    What `rarefy.finalize` makes of a copy is exported, so that the file holds dense weights with zeros.

    Args:
        model: any module.
        inputs: a tensor for each argument of its `forward`, by name and in order; their first dimension may have
            another size later.
        out: the file, which is replaced if it is there.
        outputs: names of what it gives.

    Raises:
        RarefyError: the extra `onnx` is not installed, torch cannot export the model, or the file cannot be written;
            what was there before stays.

    Example:
        >>> to_onnx(nn.Linear(2, 2), {"x": torch.ones(3, 2)}, "model.onnx")  # doctest: +SKIP
    """
    _require_exporter()
    path = Path(out)
    check_free(path, is_folder=False, force=True)
    network = finalize(copy.deepcopy(model))
    free = [{0: torch.export.Dim.AUTO} if tensor.ndim else {} for tensor in inputs.values()]
    content = _to_onnx(Interface(network, inputs, list(outputs), free))
    write(path, lambda made: write_file(made, [content]))


@dataclass(frozen=True)
class Interface:
    """What an ONNX file computes.

    Args:
        network: takes tensors and gives a tensor or a tuple of them.
        examples: one tensor per input, with its name.
        outputs: the names of what it gives.
        dynamic: for each input the dimensions whose size is free.
    """

    network: nn.Module
    examples: Mapping[str, Tensor]
    outputs: list[str]
    dynamic: list[dict[int, Any]]


class Logits(nn.Module):
    """A Hugging Face model from token ids to logits."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor) -> Tensor:
        """Logits [batch, sequence, vocabulary]."""
        return self.model(input_ids=input_ids).logits


class Positional(nn.Module):
    """A model that takes the tensors of a batch one by one.

    Args:
        model: takes the batch as a whole.
        like: a batch, which gives the form.
    """

    def __init__(self, model: nn.Module, like: Any) -> None:
        super().__init__()
        self.model = model
        self.call = ModelCall(model)
        self.keys = tuple(like) if isinstance(like, Mapping) else None
        self.kind: Any = type(like)

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """Every tensor that the model gives."""
        return tuple(_outputs(self.call(self._batch(tensors))).values())

    def _batch(self, tensors: tuple[Tensor, ...]) -> Any:
        if self.keys is not None:
            return dict(zip(self.keys, tensors, strict=True))
        if self.kind is Tensor:
            return tensors[0]
        return self.kind(*tensors) if hasattr(self.kind, "_fields") else self.kind(tensors)


def _interface(job: Job) -> Interface:
    model = job.model()
    if isinstance(model, GPTModel | HuggingFaceCausalModel):
        network = model.model if isinstance(model, GPTModel) else Logits(model.model)
        ids = torch.zeros(EXAMPLE_SHAPE, dtype=torch.int64)
        return Interface(network, {"input_ids": ids}, ["logits"], [TOKENS])
    batch = job.batch()
    examples = _inputs(batch)
    network = Positional(model, batch)
    with torch.no_grad():
        # Called once, to learn the names of what it gives.
        outputs = list(_outputs(network.call(batch)))
    free = [{0: torch.export.Dim.AUTO} if tensor.ndim else {} for tensor in examples.values()]
    return Interface(network, examples, outputs, free)


def _inputs(batch: Any) -> dict[str, Tensor]:
    tensors = _named(batch, "input")
    if not tensors or not all(isinstance(value, Tensor) for value in tensors.values()):
        allowed = "a tensor, or a mapping or tuple of tensors"
        raise RarefyError(f"the model's batches are of another form than ONNX takes; it needs {allowed}")
    return tensors


def _outputs(given: Any) -> dict[str, Tensor]:
    """The tensors that a model returned, by name."""
    named = _named(given, "output")
    if not named and hasattr(given, "loss"):
        named = {"loss": given.loss}
    return {name: value for name, value in named.items() if isinstance(value, Tensor)}


def _named(value: Any, word: str) -> dict[str, Any]:
    if isinstance(value, Tensor):
        return {word: value}
    if isinstance(value, Mapping):
        return {str(key): item for key, item in value.items()}
    if isinstance(value, list | tuple):
        names = getattr(value, "_fields", [f"{word}_{index}" for index in range(len(value))])
        return dict(zip(names, value, strict=True))
    return {}


def _require_exporter() -> None:
    try:
        import onnx  # noqa: F401  # pyright: ignore[reportMissingImports]
        import onnxscript  # noqa: F401  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise RarefyError(f"--to onnx needs {error.name}: pip install 'rarefy[onnx]'") from error


def _to_onnx(interface: Interface) -> bytes:
    with _quiet():
        try:
            program: Any = torch.onnx.export(
                interface.network.eval(),
                tuple(interface.examples.values()),
                dynamo=True,
                verbose=False,
                input_names=list(interface.examples),
                output_names=interface.outputs,
                dynamic_shapes=_shapes(interface),
            )
            return program.model_proto.SerializeToString()
        except Exception as error:
            # torch wraps the reason in a page of advice.
            reason = " ".join(str(error.__cause__ or error).split())[:200]
            raise RarefyError(f"torch cannot export this model to ONNX ({reason}); use --to dense") from error


def _shapes(interface: Interface) -> Any:
    """`Positional` takes its tensors as one variadic argument, so their shapes are one tuple."""
    shapes = tuple(interface.dynamic)
    return (shapes,) if isinstance(interface.network, Positional) else shapes


@contextmanager
def _quiet() -> Iterator[None]:
    """Without what torch's exporter says of operators of other packages."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)

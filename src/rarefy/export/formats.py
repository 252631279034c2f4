"""The formats by name, and the export of one model."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from rarefy.checkpoint.manifest import MANIFEST_NAME
from rarefy.checkpoint.saved_model import SavedModel, open_saved
from rarefy.checkpoint.writing.folders import DIRECTORY_NAME
from rarefy.errors import ConfigError, RarefyError, did_you_mean
from rarefy.export import output, state_files
from rarefy.export.hugging_face import hugging_face
from rarefy.export.job import Fill, Job
from rarefy.export.onnx_file import onnx

FORMATS: Mapping[str, Callable[[Job], Fill]] = MappingProxyType(
    {
        "dense": state_files.dense,
        "safetensors": state_files.safetensors,
        "csr": state_files.csr,
        "onnx": onnx,
        "hf": hugging_face,
    }
)
FOLDERS = ("hf",)


@dataclass(frozen=True)
class Exported:
    """What an export came to.

    Args:
        path: what was written.
        format: its format.
        dense_bytes: the tensors of the dense model, tied ones once.
        exported_bytes: the file, or all files of the folder.
        sparse_weights: how many weights have a mask.
        connections: positions of these weights.
        active: how many of them are active.
        nonzeros: numbers in the whole model that are not zero.
        size: numbers in the whole model.
    """

    path: Path
    format: str
    dense_bytes: int
    exported_bytes: int
    sparse_weights: int
    connections: int
    active: int
    nonzeros: int
    size: int

    @property
    def ratio(self) -> float:
        """Exported bytes against dense ones."""
        return self.exported_bytes / self.dense_bytes if self.dense_bytes else 0.0

    @property
    def sparsity(self) -> float:
        """The measured sparsity of all weights with a mask together."""
        return 1 - self.active / self.connections if self.connections else 0.0


def export(
    checkpoint: SavedModel | str | Path,
    to: str,
    out: str | Path,
    *,
    force: bool = False,
    params: Path | None = None,
    allow_imports: bool = True,
) -> Exported:
    """Writes a trained model in a format that other programs read.

    Args:
        checkpoint: a checkpoint, a directory of them, a file, or what `open_saved` made of one.
        to: `dense`, `safetensors`, `csr`, `onnx` or `hf`.
        out: the file, or for `hf` the folder, to write; it appears whole or not at all.
        force: replaces what is there.
        params: the file of the run; for `onnx` and `hf`, which build the model, where the checkpoint does
            not say how, or names a `./file.py`.
        allow_imports: whether import paths in the configuration may be followed.

    Returns:
        Where it is and how large.

    Raises:
        ConfigError: an unknown format.
        RarefyError: the path is taken, the model cannot be read or exported, or the file system refuses.

    Example:
        >>> import tempfile, torch
        >>> state = {"weight": torch.eye(64), "weight_mask": torch.eye(64).bool()}
        >>> folder = Path(tempfile.mkdtemp())
        >>> export(SavedModel(Path("run"), state), "csr", folder / "model.safetensors").active
        64
    """
    if to not in FORMATS:
        allowed = f"{', '.join(FORMATS)} ({did_you_mean(to, FORMATS)})"
        raise ConfigError("--to", repr(to), allowed, "--to safetensors")
    out = Path(out)
    # First, as the model may take minutes to read.
    output.check_free(out, is_folder=to in FOLDERS, force=force)
    saved = checkpoint if isinstance(checkpoint, SavedModel) else open_saved(Path(checkpoint))
    _refuse_checkpoints(out, saved.path)
    fill = FORMATS[to](Job(saved, params, allow_imports))
    return _report(saved, to, out, output.write(out, fill))


def _refuse_checkpoints(out: Path, source: Path) -> None:
    """Refuses to write over what is exported, and into any checkpoint, of which each file is accounted for."""
    whole = out.resolve()
    if whole == source.resolve() and source.is_file():
        raise RarefyError(f"{out}: is what is exported, which must stay as it is; give another path")
    if whole in source.resolve().parents:
        raise RarefyError(f"{out}: holds what is exported, which must stay as it is; give another path")
    folders = (whole, *whole.parents)
    checkpoints = (one for one in folders if DIRECTORY_NAME.fullmatch(one.name))
    if source.resolve() in folders or any((one / MANIFEST_NAME).exists() for one in checkpoints):
        raise RarefyError(f"{out}: is inside the checkpoint, which must stay as it is; give another path")


def _report(saved: SavedModel, to: str, out: Path, written: int) -> Exported:
    once = [tensor for name, tensor in saved.dense.items() if name not in saved.tied]
    masks = [mask for name, mask in saved.masks.items() if name not in saved.tied]
    return Exported(
        path=out,
        format=to,
        dense_bytes=sum(tensor.numel() * tensor.element_size() for tensor in once),
        exported_bytes=written,
        sparse_weights=len(masks),
        connections=sum(mask.numel() for mask in masks),
        active=sum(int(mask.sum()) for mask in masks),
        nonzeros=sum(int((tensor != 0).sum()) for tensor in once),
        size=sum(tensor.numel() for tensor in once),
    )

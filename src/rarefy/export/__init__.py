"""Trained models for other programs: dense weights, safetensors, values and indices, ONNX, Hugging Face."""

from rarefy.export.formats import FORMATS, Exported, export
from rarefy.training.csr_file import load_csr
from rarefy.training.saved_model import SavedModel, open_saved

__all__ = ["FORMATS", "Exported", "SavedModel", "export", "load_csr", "open_saved"]

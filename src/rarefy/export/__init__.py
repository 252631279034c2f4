"""Trained models for other programs: dense weights, safetensors, values and indices, ONNX, Hugging Face."""

from rarefy.checkpoint.csr_file import load_csr
from rarefy.checkpoint.saved_model import SavedModel, open_saved
from rarefy.export.formats import FORMATS, Exported, export
from rarefy.export.onnx_file import to_onnx

__all__ = ["FORMATS", "Exported", "SavedModel", "export", "load_csr", "open_saved", "to_onnx"]

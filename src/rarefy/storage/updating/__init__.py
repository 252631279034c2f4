"""What an update asks of a weight: its dense form, and the part of its gradient that growing can need."""

from rarefy.storage.updating.dense_form import DenseForm
from rarefy.storage.updating.growth import GrowthRequest

__all__ = ["DenseForm", "GrowthRequest"]

"""A sparse model in its fastest form for this machine, to be used and not trained."""

from rarefy.inference.fastest import Compacted, CompactedLayer, compact

__all__ = ["Compacted", "CompactedLayer", "compact"]

"""First masks that are measured on data or on another checkpoint, for `init_method`, as objects.

`init_method={"name": "snip", "batches": batches}` and `init_method=Snip(batches=batches)` are the same.
"""

from rarefy.first_masks.from_file import TopKOf
from rarefy.first_masks.kinds import Grasp, MagnitudeMixed, Snip, SynFlow, Wanda

__all__ = ["Grasp", "MagnitudeMixed", "Snip", "SynFlow", "TopKOf", "Wanda"]

"""First masks that are measured on data or on another checkpoint, for `init_method`, as objects.

`init_method={"name": "snip", "batches": batches}` and `init_method=Snip(batches=batches)` are the same.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from rarefy.imports import on_first_use

if TYPE_CHECKING:
    from rarefy.first_masks.from_file import TopKOf
    from rarefy.first_masks.kinds import Grasp, MagnitudeMixed, Snip, SynFlow, Wanda

__all__ = ["Grasp", "MagnitudeMixed", "Snip", "SynFlow", "TopKOf", "Wanda"]

__getattr__ = on_first_use(
    {
        "Grasp": "rarefy.first_masks.kinds",
        "MagnitudeMixed": "rarefy.first_masks.kinds",
        "Snip": "rarefy.first_masks.kinds",
        "SynFlow": "rarefy.first_masks.kinds",
        "TopKOf": "rarefy.first_masks.from_file",
        "Wanda": "rarefy.first_masks.kinds",
    }
)

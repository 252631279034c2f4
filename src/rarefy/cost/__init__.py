"""When a storage pays: the rule, its calibration, and what it is measured with."""

from rarefy.cost.rule import break_even_sparsity, pays_off, relative_time

__all__ = ["break_even_sparsity", "pays_off", "relative_time"]

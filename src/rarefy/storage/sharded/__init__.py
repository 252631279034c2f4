"""Weights that `fully_shard` cuts in pieces, of which each process holds one."""

from rarefy.storage.sharded.pieces import ShardedStorage, followed, in_pieces, refuse_gathered

__all__ = ["ShardedStorage", "followed", "in_pieces", "refuse_gathered"]

"""Weights that `fully_shard` cuts in pieces, of which each process holds one."""

from rarefy.storage.sharded.pieces import ShardedStorage, first_storage, followed, refuse_gathered

__all__ = ["ShardedStorage", "first_storage", "followed", "refuse_gathered"]

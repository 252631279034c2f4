"""How a checkpoint comes to the disk, by one process or by several."""

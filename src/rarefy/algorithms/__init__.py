"""Which connections are active, and when that changes: one algorithm a file."""

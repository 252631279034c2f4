"""How much each connection of a model matters, measured on data: scores, and what they are computed from."""

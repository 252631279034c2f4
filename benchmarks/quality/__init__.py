"""How good sparse models are: one table a file, `python -m quality TABLE` in this folder's parent."""

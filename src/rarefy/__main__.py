"""`python -m rarefy`, which is what torchrun starts."""

from rarefy.cli import main

main()

"""`python -m rarefy.cli`."""

from rarefy.cli import main

if __name__ == "__main__":
    main()

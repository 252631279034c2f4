"""The command `rarefy`."""

from rarefy.cli.app import app


def main() -> None:
    """Runs the command line."""
    app()


__all__ = ["app", "main"]

"""The command `rarefy`."""

import sys


def main() -> None:
    """Runs the command line; Ctrl-C ends it with one line and exit code 130, even while it is still importing."""
    try:
        # Imported here, as torch takes seconds, and Ctrl-C during them should end in one line too.
        from rarefy.cli.overview import ASKED, listing

        if sys.argv[1:] in ASKED:
            listing()()
        from rarefy.cli.app import app

        app()
    except KeyboardInterrupt:
        print("Error: interrupted", file=sys.stderr)
        sys.exit(130)

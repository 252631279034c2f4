"""What `import rarefy` adds to `import torch`: whole processes, interleaved, medians.

Limit: 0.3 seconds. Most of rarefy is imported when a name is first used; the last line shows all of that at once.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable

from interleave import medians

PROGRAMS = {
    "torch": "import torch",
    "rarefy": "import torch, rarefy",
    "every name": "import torch; from rarefy import *",
}


def starter(program: str, cache: str) -> Callable[[], object]:
    """A call that runs the program in a fresh interpreter; compiled to bytecode once, as installed packages are."""
    environment = os.environ | {"PYTHONDONTWRITEBYTECODE": "", "PYTHONPYCACHEPREFIX": cache}
    return lambda: subprocess.run([sys.executable, "-c", program], env=environment, check=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=15)
    rounds = parser.parse_args().rounds
    with tempfile.TemporaryDirectory() as cache:
        seconds = medians({name: starter(program, cache) for name, program in PROGRAMS.items()}, rounds)
    print(f"{'import torch':32}{seconds['torch']:7.2f} s")
    for name in ("rarefy", "every name"):
        added, ratio = seconds[name] - seconds["torch"], seconds[name] / seconds["torch"]
        print(f"{'and ' + name:32}{seconds[name]:7.2f} s   added {added:5.2f} s   ratio {ratio:.2f}")


if __name__ == "__main__":
    main()

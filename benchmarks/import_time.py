"""What `import rarefy` adds to `import torch`, and what `rarefy --help` takes: whole processes, interleaved, medians.

Limit: 0.3 seconds. Most of rarefy is imported when a name is first used; "every name" shows all of that at once.
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
    "rarefy --help": "import sys; sys.argv[1:] = ['--help']; from rarefy.cli import main; main()",
}


def starter(program: str, cache: str) -> Callable[[], object]:
    """A call that runs the program in a fresh interpreter; compiled to bytecode once, as installed packages are."""
    environment = os.environ | {"PYTHONDONTWRITEBYTECODE": "", "PYTHONPYCACHEPREFIX": cache}
    command = [sys.executable, "-c", program]
    return lambda: subprocess.run(command, env=environment, check=True, stdout=subprocess.DEVNULL)


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
    share = seconds["rarefy --help"] / seconds["torch"]
    print(f"{'rarefy --help':32}{seconds['rarefy --help']:7.2f} s   ratio {share:.2f}")


if __name__ == "__main__":
    main()

"""Table 6: the same task with other libraries: score, seconds, memory, lines of code.

Each library has its own Python, which `RIVALS` names, as `library=python;library=python`; one that is not named runs
in this one, and one that cannot be imported is said to be missing. Each run is a process of its own on one thread.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np

from .records import Row, complete, summarised
from .table import BUILD, Scale, Table
from .tasks import mnist1d

RUNS = {
    "torch": ("dense",),
    "rarefy": ("rigl", "gmp", "static"),
    "torch_prune": ("gradual",),
    "torch_ao": ("gradual",),
    "sparselab": ("rigl", "static"),
    "sparseprop": ("static",),
    "jaxpruner": ("rigl", "magnitude"),
}
IMPORTS = {"torch_prune": "torch.nn.utils.prune", "torch_ao": "torch.ao.pruning"}
GRID = (1e-3, 3e-3, 1e-2, 3e-2)
STEPS = 300
ONE_THREAD = {
    "OMP_NUM_THREADS": "1",
    "JAX_PLATFORMS": "cpu",
    "XLA_FLAGS": "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1",
}


def pythons() -> dict[str, str]:
    """The Python of each library that has one of its own."""
    given = os.environ.get("RIVALS", "")
    return dict(pair.split("=", 1) for pair in given.split(";") if pair)


def python_of(library: str) -> str:
    return pythons().get(library, sys.executable)


def is_there(library: str) -> bool:
    """Whether a library can be imported; says so where it cannot."""
    module = IMPORTS.get(library, library)
    found = subprocess.run([python_of(library), "-c", f"import {module}"], capture_output=True, text=True)
    if found.returncode:
        print(f"{library} is left out: {found.stderr.strip().splitlines()[-1]}")
    return not found.returncode


def data_file() -> Path:
    """MNIST-1D as arrays, for Pythons without its package: tuning judges on a part of the training data."""
    path = BUILD / "mnist1d.npz"
    tuning = BUILD / "mnist1d_tuning.npz"
    path.parent.mkdir(parents=True, exist_ok=True)
    for file, is_tuning in ((path, False), (tuning, True)):
        names = ("x", "y", "x_test", "y_test")
        arrays = (tensor.numpy() for tensor in mnist1d().split(is_tuning))
        np.savez(file, **dict(zip(names, arrays, strict=True)))
    return path.resolve()


def run_library(library: str, method: str, data: Path, steps: int, lr: float, seed: int) -> Row:
    """One run in a process of its own: a library may keep things from one model to the next."""
    command = [python_of(library), "-m", f"quality.rival_runs.with_{library}", method, "--data", str(data)]
    flags = ["--steps", str(steps), "--lr", str(lr), "--seed", str(seed)]
    # The package's own folder of benchmarks, whatever Python it is.
    path = os.pathsep.join([str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, **ONE_THREAD, "PYTHONPATH": path}
    root = Path(__file__).parents[2]
    done = subprocess.run([*command, *flags], env=environment, capture_output=True, text=True, cwd=root)
    if done.returncode:
        raise RuntimeError(f"{library} {method}: {done.stderr}")
    (outcome,) = (json.loads(line) for line in done.stdout.splitlines() if line.startswith("{"))
    return outcome


def tuned_rate(library: str, method: str, steps: int, data: Path, scale: Scale) -> float:
    """The learning rate of a library's method, as for the other tables."""
    if scale.quick:
        return GRID[1]
    judged = data.with_name("mnist1d_tuning.npz")
    cells = [
        {"library": library, "method": method, "steps": steps, "lr": rate, "seed": seed}
        for rate in GRID
        for seed in scale.tuning_seeds
    ]

    def measure(cell: Row) -> Row:
        return {"score": run_library(library, method, judged, steps, cell["lr"], cell["seed"])["score"]}

    rows = complete(scale.folder / "rivals_rates.csv", cells, measure)
    return max(summarised(rows, ["score"]), key=lambda row: row["score"])["lr"]


def run(scale: Scale) -> None:
    """Measures what is missing, of the libraries that are there."""
    runs = [
        (library, method)
        for library, methods in RUNS.items()
        if is_there(library)
        for method in methods[: 1 if scale.quick else None]
    ]
    data = data_file()
    steps = STEPS // 10 if scale.quick else STEPS
    cells = [
        {"library": library, "method": method, "steps": steps, "lr": rate, "seed": seed}
        for library, method, rate in [(*one, tuned_rate(*one, steps, data, scale)) for one in runs]
        for seed in scale.seeds[: 1 if scale.quick else None]
    ]

    def measure(cell: Row) -> Row:
        return run_library(cell["library"], cell["method"], data, steps, cell["lr"], cell["seed"])

    # All libraries with one seed, then with the next: a busy hour slows them alike.
    complete(scale.folder / "rivals.csv", sorted(cells, key=lambda cell: cell["seed"]), measure)


TABLE = Table("rivals", run, ("score", "zeros", "seconds", "megabytes"))

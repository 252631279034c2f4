"""Makes the pictures of the pages: a run in a terminal, its schedules, its report.

Needs chromium for the report and the extra `plot` for the schedules; run it from anywhere after what it shows has changed.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from rich.console import Console
from rich.text import Text

PICTURES = Path(__file__).parents[1] / "pictures"
NET = """
import torch
from torch import nn


class Net(nn.Module):
    def __init__(self, width=256):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(64, width), nn.ReLU(), nn.Linear(width, 64), nn.ReLU(), nn.Linear(64, 8))

    def forward(self, batch):
        return (self.layers(batch) - batch[:, :8].cumsum(1)).square().mean()


def make_batches():
    return list(torch.randn(400, 32, 64, generator=torch.Generator().manual_seed(0)))
"""
PARAMS = """
trainer:
  init:
    seed: 1
    model: {name: "./net.py:Net"}
    optimizer: {AdamW: {lr: 3e-3}}
    loop: {max_steps: 400}
    logging: {log_steps: 40}
    sparsity:
      algorithm: rigl
      sparsity: {type: polynomial, init: 0.5, final: 0.9, start: 0, stop: 240}
      update: {freq: 40, stop: "75%"}
      drop_fraction: {type: cosine, init: 0.3, half_period: "75%"}
    callbacks: [LogSparsity: {}]
  fit:
    train_dataloader: {data_processor: "./net.py:make_batches"}
"""
FLAGS = ("--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--virtual-time-budget=5000")


def rarefy(folder: Path, *words: str) -> str:
    """What a command prints in a terminal that is 100 wide."""
    command = [sys.executable, "-m", "rarefy.cli", *words]
    there = os.environ | {"COLUMNS": "100"}
    answer = subprocess.run(command, cwd=folder, env=there, capture_output=True, text=True, check=True)
    return answer.stdout + answer.stderr


def draw_terminal(folder: Path) -> None:
    """The run, as somebody sees it, as an SVG file."""
    told = [line.rstrip() for line in rarefy(folder, "run", "params.yaml", "-o", "model_dir").splitlines()]
    console = Console(record=True, width=112, file=open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115
    for line in ["$ rarefy run params.yaml", *told]:
        console.print(Text(line))
    console.save_svg(str(PICTURES / "run.svg"), title="rarefy run")


def draw_report(folder: Path) -> None:
    """The upper part of the report, as a browser shows it."""
    rarefy(folder, "report", "model_dir", "-o", "report.html")
    browser = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if browser is None:
        raise SystemExit("the picture of the report needs chromium (Debian: apt-get install chromium)")
    shot = f"--screenshot={PICTURES / 'report.png'}"
    size = ("--window-size=1000,1250", f"--user-data-dir={folder / 'profile'}")
    subprocess.run(
        [browser, *FLAGS, *size, shot, (folder / "report.html").as_uri()], check=True, capture_output=True
    )


def main() -> None:
    """Makes all of them."""
    PICTURES.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "net.py").write_text(NET)
        (folder / "params.yaml").write_text(PARAMS)
        draw_terminal(folder)
        rarefy(folder, "plot", "params.yaml", "-o", str(PICTURES / "schedules.png"))
        draw_report(folder)


if __name__ == "__main__":
    main()

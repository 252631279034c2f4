"""The walks of docs/architecture.md and the diagrams of storage/README.md name what is there."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from rarefy.storage.gradients import DenseGradient

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src" / "rarefy"
README = (SOURCE / "storage" / "README.md").read_text()
WALKS = re.findall(
    r"^From (.+?), (\w+) files:\n\n((?:\d+\. .+\n)+)",
    (ROOT / "docs" / "architecture.md").read_text(),
    re.MULTILINE,
)
# The first one of the README.
FIRST_FILE = re.findall(r"```yaml\n(.+?)```", (ROOT / "README.md").read_text(), re.DOTALL)[0]
NUMBERS = {"seven": 7, "eleven": 11, "twelve": 12}


@pytest.mark.parametrize(("start", "count", "steps"), WALKS)
def test_a_walk_opens_few_files_and_each_is_there(start: str, count: str, steps: str) -> None:
    lines = steps.splitlines()
    assert len(lines) == NUMBERS[count] <= (8 if "sparsity: 0.9" in start else 12)
    for line in lines:
        file, *names = re.findall(r"`([^`]+)`", line)
        text = (SOURCE / file).read_text()
        for name in names:
            if not (SOURCE / name).exists():
                assert name.split(".")[-1] in text, f"{file} knows no {name}"


def test_there_are_three_walks() -> None:
    assert len(WALKS) == 3


def is_file(line: str) -> bool:
    return (SOURCE / line).is_file()


# As docs/architecture.md says; one more may come, but whoever adds some should see what they do.
MOST_BEFORE_TRAINING = 128
MOST_ENTERED = 139


def test_a_run_enters_few_files_before_it_trains_and_until_its_first_step_is_over(tmp_path: Path) -> None:
    (tmp_path / "params.yaml").write_text(FIRST_FILE)
    program = [sys.executable, str(Path(__file__).with_name("entered_files.py")), "run", "params.yaml"]
    environment = {**os.environ, "PYTHONPATH": str(SOURCE.parent), "RAREFY_CALIBRATE": "0"}
    done = subprocess.run(program, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True)
    # Paragraphs without a file are what the run itself prints.
    sections = [[*filter(is_file, part.splitlines())] for part in done.stdout.split("\n\n")]
    before, later = [section for section in sections if section]
    entered = before + later
    walked = set(re.findall(r"^\d+\. `([^`]+)`", WALKS[-1][2], re.MULTILINE))
    assert walked - {*entered} <= {"trainer/state.py"}, "there is no checkpoint to restore"
    assert len(before) <= MOST_BEFORE_TRAINING, "\n".join(before)
    assert len(entered) <= MOST_ENTERED, "\n".join(entered)


def test_the_readme_of_the_storages_covers_them() -> None:
    files = {path.stem for path in (SOURCE / "storage").glob("*.py")} - {"__init__"}
    listed = {
        name
        for row in re.findall(r"^\| (`.+?) \|", README, re.MULTILINE)
        for name in re.findall(r"`(\w+)`", row)
    }
    assert listed == files


def test_every_event_of_a_dense_gradient_is_drawn() -> None:
    events = {
        name for name, value in vars(DenseGradient).items() if callable(value) and not name.startswith("_")
    }
    assert not [name for name in events if not re.search(rf"\b{name}\b", README)]

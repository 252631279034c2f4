"""Every Python and YAML block of the README and of docs/ runs."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from rarefy.cli.app import app

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```", re.MULTILINE | re.DOTALL)
BLOCKS = [(page, language, text) for page in PAGES for language, text in BLOCK.findall(page.read_text())]


def blocks_of(language: str) -> list:
    chosen = [(page, text) for page, found, text in BLOCKS if found == language]
    return [pytest.param(text, id=f"{page.stem}-{number}") for number, (page, text) in enumerate(chosen)]


@pytest.mark.parametrize("text", blocks_of("python"))
def test_python_block(text, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    exec(compile(text, "block.py", "exec"), {"__name__": "__main__"})


@pytest.mark.parametrize("text", blocks_of("yaml"))
def test_yaml_block(text, tmp_path):
    path = tmp_path / "params.yaml"
    path.write_text(text)
    assert set(yaml.safe_load(text)) == {"trainer"}
    flags = ["--num_steps", "2", "--eval_steps", "1", "-o", str(tmp_path / "run")]
    result = CliRunner().invoke(app, ["run", str(path), *flags])
    assert result.exit_code == 0, result.output
    assert "actual sparsity" in result.output


def test_links_lead_somewhere():
    for page in PAGES:
        prose = re.sub(r"`[^`]*`", "", BLOCK.sub("", page.read_text()))
        for target in re.findall(r"\]\(([^)#]+)[^)]*\)", prose):
            assert target.startswith("https://") or (page.parent / target).exists(), f"{page.name}: {target}"


def test_there_is_something_to_run():
    assert len(blocks_of("python")) >= 2 and len(blocks_of("yaml")) >= 1

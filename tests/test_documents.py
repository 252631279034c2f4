"""The README and docs/: every block runs, every link leads somewhere, nothing public is left out."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import io
import re
import runpy
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.main import get_command
from typer.testing import CliRunner

import rarefy
import tiny_run
from document_blocks import (
    DOCS,
    PAGES,
    ROOT,
    Block,
    anchors,
    blocks,
    commands,
    fences,
    links,
    references,
)
from rarefy.cli.app import app
from rarefy.config import accepted_options
from rarefy.initializers import INITIALIZERS
from rarefy.methods.registry import ALGORITHMS
from rarefy.run.file_keys import InitBlock
from rarefy.schedules import SCHEDULES

BLOCKS = [block for page in PAGES for block in blocks(page)]
GUIDE = DOCS / "sparsity.md"
REPOSITORY = "https://github.com/rarefy/rarefy/"
TRAINS = {"run", "fit"}
BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
RUNS = TRAINS | {"validate", "validate_all", "schema", "prune"}
SHORT = ["--num_steps", "2"]
LENGTHS = {"--num_steps", "--max_steps", "--num_epochs"}


def blocks_of(*languages: str) -> list[Any]:
    chosen = [block for block in BLOCKS if block.language in languages]
    return [
        pytest.param(block, id=f"{block.page.stem}-{number}-{block.title}")
        for number, block in enumerate(chosen)
    ]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty working directory whose Python files can be imported."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    known = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - known:
        if str(getattr(sys.modules[name], "__file__", "")).startswith(str(tmp_path)):
            del sys.modules[name]


def save_files_of(page: Path, folder: Path) -> None:
    """Every file that a page tells its reader to save, and a `params.yaml` in any case."""
    tiny_run.write(folder, tiny_run.configuration(folder))
    whole = [block for block in blocks(page) if block.language == "yaml" and "trainer:" in block.text]
    for block in whole[:1]:
        (folder / "params.yaml").write_text(block.text)
    for block in blocks(page):
        if block.title:
            (folder / block.title).write_text(block.text)


@pytest.mark.parametrize("block", blocks_of("python"))
def test_python_block(block: Block, folder: Path) -> None:
    save_files_of(block.page, folder)
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(block.text, "block.py", "exec"), {"__name__": "__main__"})
    assert block.prints is None or tidy(printed.getvalue()) == tidy(block.prints)


def tidy(text: str) -> list[str]:
    return [line.rstrip() for line in text.strip().splitlines()]


@pytest.mark.parametrize("block", blocks_of("yaml"))
def test_yaml_block(block: Block, folder: Path) -> None:
    """A whole file takes two steps; a part of `trainer.init` is put into the page's file, which trains to its end."""
    save_files_of(block.page, folder)
    path, content = folder / "params.yaml", yaml.safe_load(block.text)
    is_part = "trainer" not in content
    if is_part:
        assert content.keys() <= InitBlock.model_fields.keys()
        whole = yaml.safe_load(path.read_text())
        whole["trainer"]["init"] |= content
        path.write_text(yaml.safe_dump(whole))
    else:
        path.write_text(block.text)
    length = [*([] if is_part else SHORT), "--eval_steps", "1"]
    result = rarefy_command(["run", "params.yaml", "-o", "run", *length])
    assert result.exit_code == 0, result.output
    assert "sparsity" not in block.text or "actual sparsity" in result.output
    # The model of the pages is so small that a high sparsity leaves few connections, which is said.
    said = result.output.replace("Warning: fewer than 4 connections an output", "")
    assert not is_part or "Warning" not in said


@pytest.mark.parametrize("block", blocks_of("bash"))
def test_bash_block(block: Block, folder: Path) -> None:
    save_files_of(block.page, folder)
    for words in commands(block.text):
        CHECKS[words[0]](words[1:])


def rarefy_command(words: list[str]) -> Any:
    return CliRunner().invoke(app, words, env={"COLUMNS": "200"})


def check_rarefy(words: list[str]) -> None:
    """Runs a command that trains or validates, two steps unless it says how many; of others every flag must exist."""
    if words[0] not in RUNS:
        return check_flags(words)
    if words[0] in TRAINS:
        words = [*words, *(SHORT if LENGTHS.isdisjoint(words) else []), "--eval_steps", "1"]
    # A page may prune what its reader has.
    if words[0] == "prune" and not Path(words[1]).exists():
        return check_flags(words)
    result = rarefy_command(words)
    assert result.exit_code == 0, result.output


def check_flags(words: list[str]) -> None:
    command: Any = get_command(app)
    while words and hasattr(command, "commands") and not words[0].startswith("-"):
        command, words = command.commands[words[0]], words[1:]
    known = {flag for parameter in command.params for flag in [*parameter.opts, *parameter.secondary_opts]}
    known |= {"-h", "--help"}
    assert {word.split("=")[0] for word in words if word.startswith("-")} <= known


def check_python(words: list[str]) -> None:
    if words[:2] != ["-m", "venv"]:
        runpy.run_path(words[0], run_name="__main__")


def check_pip(words: list[str]) -> None:
    section = (ROOT / "pyproject.toml").read_text().partition("[project.optional-dependencies]")[2]
    extras = set(re.findall(r"^(\w+) = \[", section, re.MULTILINE))
    assert words[0] == "install"
    for word in words[1:]:
        asked = word.partition("[")[2].rstrip("]")
        assert set(filter(None, asked.split(","))) <= extras


def check_make(words: list[str]) -> None:
    makefile = (ROOT / "Makefile").read_text().splitlines()
    assert all(any(line.startswith(f"{target}:") for line in makefile) for target in words)


CHECKS = {
    "rarefy": check_rarefy,
    "python": check_python,
    "python3": check_python,
    "pip": check_pip,
    "make": check_make,
    "source": lambda words: None,
}


def test_a_misspelt_flag_is_found() -> None:
    check_flags(["data", "hdf5", "a.txt", "-o", "out", "--max_sequence_length", "8"])
    with pytest.raises(AssertionError):
        check_flags(["run", "params.yaml", "--validate-only"])


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_every_block_is_known(page: Path) -> None:
    assert 2 * len(blocks(page)) == fences(page)
    assert {block.language for block in blocks(page)} <= {"python", "yaml", "bash", "text"}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links_lead_somewhere(page: Path) -> None:
    for target in links(page):
        if page.parent == ROOT and target.startswith(REPOSITORY):
            # The page of a package index shows the README alone, so its links are whole addresses.
            assert (ROOT / target.removeprefix(REPOSITORY).partition("/main/")[2]).exists(), target
        assert page.parent != ROOT or target.startswith("https://"), f"{target} is lost on a package index"
        path, _, anchor = target.partition("#")
        if target.startswith("https://"):
            continue
        other = (page.parent / path).resolve() if path else page
        assert other.exists(), f"{page.name}: {target}"
        assert other.is_relative_to(DOCS), f"{target} is not on the site"
        assert not anchor or anchor in anchors(other), f"{page.name}: {target}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_names_in_references_exist(page: Path) -> None:
    for name in references(page):
        assert find(name) is not None, name


def find(name: str) -> Any:
    """The object of a dotted name; None without one."""
    parts = name.split(".")
    for cut in range(len(parts), 0, -1):
        with contextlib.suppress(ImportError):
            found: Any = importlib.import_module(".".join(parts[:cut]))
            for part in parts[cut:]:
                found = getattr(found, part, None)
            return found
    return None


def test_the_reference_holds_every_public_name() -> None:
    shown = {name for page in PAGES for name in references(page) if page.parent.name == "api"}
    modules = {"callbacks": {f"rarefy.callbacks.{name}" for name in ("LogSparsity", "ComputeNorm")}}
    for name in rarefy.__all__:
        assert modules.get(name, {f"rarefy.{name}"}) <= shown, name


def test_pictures_are_shown_small_and_made_by_a_script() -> None:
    pictures = {path.name for path in (DOCS / "pictures").iterdir()}
    shown = {
        name for page in PAGES for name in re.findall(r"!\[[^]]+\]\(pictures/([^)]+)\)", page.read_text())
    }
    made = (DOCS / "scripts" / "pictures.py").read_text()
    assert pictures == shown and len(pictures) >= 3
    for name in pictures:
        assert (DOCS / "pictures" / name).stat().st_size < 100_000
        # Plots of results come from the script of their page, which tests of its own compare with the raw results.
        assert name in made or name.startswith("results_")


def test_every_page_is_in_the_navigation() -> None:
    listed: list[str] = []

    def walk(entry: Any) -> None:
        for part in entry if isinstance(entry, list) else entry.values() if isinstance(entry, dict) else ():
            walk(part)
        if isinstance(entry, str):
            listed.append(entry)

    walk(yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"])
    assert sorted(listed) == sorted(page.relative_to(DOCS).as_posix() for page in DOCS.rglob("*.md"))


def test_the_guide_covers_every_key_of_the_sparsity_block() -> None:
    options = {option for kind in ALGORITHMS.values() for option in accepted_options(kind)} | {"algorithm"}
    pages = (GUIDE, DOCS / "methods.md")
    shown = "".join(block.text for page in pages for block in blocks(page) if block.language == "yaml")
    assert not [key for key in options if not re.search(rf"\b{key}:", shown)]
    values = {*ALGORITHMS, *INITIALIZERS, *SCHEDULES} - {"constant"}
    assert not [value for value in values if not re.search(rf"\b{value}\b", shown)]


def test_every_yaml_tab_of_the_guide_has_a_python_tab() -> None:
    titles = [line for line in GUIDE.read_text().splitlines() if line.startswith('=== "')]
    assert titles == ['=== "YAML"', '=== "Python"'] * (len(titles) // 2)
    assert len(titles) > 40


@pytest.mark.skipif(not importlib.util.find_spec("mkdocs"), reason="needs the extra docs")
def test_the_site_builds(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "-d", str(tmp_path / "site")]
    answer = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert answer.returncode == 0, answer.stderr
    assert 'id="rarefy.RigL"' in (tmp_path / "site" / "api" / "algorithms.html").read_text()
    for page in ("index.html", "api/data.html"):
        assert not re.search(
            r'<(script|link|img)[^>]+(src|href)="https?://', (tmp_path / "site" / page).read_text()
        )
    if BROWSER is not None:
        assert search_from_disk(tmp_path / "site" / "index.html", "drop_fraction") > 0


def search_from_disk(page: Path, word: str) -> int:
    """How many pages the search of a site finds that is opened from the disk, without a network."""
    flags = ("--headless", "--no-sandbox", "--disable-gpu", "--host-resolver-rules=MAP * ~NOTFOUND")
    own = (f"--user-data-dir={page.parents[1] / 'profile'}", "--virtual-time-budget=15000", "--dump-dom")
    command = [str(BROWSER), *flags, *own, f"{page.as_uri()}?q={word}"]
    dom = subprocess.run(command, capture_output=True, text=True, timeout=90, check=True).stdout
    return dom.count('class="md-search-result__item"')

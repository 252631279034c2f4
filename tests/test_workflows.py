"""The workflows of continuous integration: well-formed, pinned by major version, and calling what exists."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]
FILES = sorted((ROOT / ".github" / "workflows").glob("*.yml"))


def load(name: str) -> dict:
    return yaml.safe_load((ROOT / ".github" / "workflows" / f"{name}.yml").read_text())


def steps_of(workflow: dict) -> list[dict]:
    return [step for job in workflow["jobs"].values() for step in job["steps"]]


def test_there_are_two_workflows():
    assert [file.stem for file in FILES] == ["test", "wheels"]


@pytest.mark.parametrize("name", ["test", "wheels"])
def test_every_job_has_a_machine_and_steps_that_do_one_thing(name):
    workflow = load(name)
    assert workflow[True]  # YAML reads the key `on` as true
    assert workflow["permissions"] == {"contents": "read"}
    for job in workflow["jobs"].values():
        assert {"runs-on", "steps"} <= set(job)
        assert set(job.get("needs", [])) <= set(workflow["jobs"])
    assert all(("uses" in step) != ("run" in step) for step in steps_of(workflow))


@pytest.mark.parametrize("name", ["test", "wheels"])
def test_actions_are_pinned_by_major_version(name):
    used = [step["uses"] for step in steps_of(load(name)) if "uses" in step]
    assert used
    assert all(re.fullmatch(r"[\w-]+/[\w-]+@v\d+", action) for action in used)


@pytest.mark.parametrize("name", ["test", "wheels"])
def test_expressions_name_what_the_job_defines(name):
    for job in load(name)["jobs"].values():
        wanted = set(re.findall(r"\$\{\{ matrix\.(\w+) \}\}", str(job)))
        assert all(wanted == set(row) for row in rows_of(job))


def rows_of(job: dict) -> list[dict]:
    """What each copy of a job is given; the keys of a plain matrix stand for all of its copies."""
    matrix = job.get("strategy", {}).get("matrix", {})
    return matrix.get("include", [matrix])


def pinned(constraints: str) -> str:
    """The version of torch in a file of constraints."""
    found = re.search(r"^torch==([\d.]+)$", (ROOT / constraints).read_text(), re.M)
    assert found is not None, constraints
    return found[1]


def test_the_test_workflow_covers_the_oldest_and_the_newest_python_and_torch():
    jobs = load("test")["jobs"]
    assert {"lint", "test", "docs"} == set(jobs)
    project = (ROOT / "pyproject.toml").read_text()
    python = re.search(r'requires-python = ">=(.*)"', project)
    torch = re.search(r'"torch>=(.*)"', project)
    assert python is not None and torch is not None
    oldest, newest = rows_of(jobs["test"])
    assert oldest == {"python": python[1], "constraints": "constraints-oldest.txt"}
    assert newest == {"python": "3.14", "constraints": "constraints.txt"}
    assert pinned("constraints-oldest.txt") == f"{torch[1]}.0"
    assert version_of(pinned("constraints.txt")) > version_of(pinned("constraints-oldest.txt"))


def version_of(text: str) -> list[int]:
    return [int(number) for number in text.split(".")]


def test_the_tests_are_given_the_constraints_of_their_job():
    commands = [step["run"] for step in load("test")["jobs"]["test"]["steps"] if "run" in step]
    assert commands == ["make test PYTHON=python CONSTRAINTS=${{ matrix.constraints }}"]
    makefile = (ROOT / "Makefile").read_text()
    installs = re.findall(r"pip install .*", makefile)
    assert installs and all("-c $(CONSTRAINTS)" in line for line in installs)


def test_the_wheels_workflow_covers_every_platform():
    jobs = load("wheels")["jobs"]
    assert {"wheels", "sdist", "installed"} == set(jobs)
    platforms = jobs["wheels"]["strategy"]["matrix"]["os"]
    assert platforms == jobs["installed"]["strategy"]["matrix"]["os"]
    assert [platform.split("-")[0] for platform in platforms] == ["ubuntu", "ubuntu", "macos"]
    assert platforms[1].endswith("-arm")


@pytest.mark.parametrize("name", ["test", "wheels"])
def test_steps_call_targets_and_files_that_exist(name):
    commands = "\n".join(step["run"] for step in steps_of(load(name)) if "run" in step)
    makefile = (ROOT / "Makefile").read_text()
    missing = [
        target
        for target in re.findall(r"make (\w+)", commands)
        if not re.search(rf"^{target}:", makefile, re.M)
    ]
    assert missing == []
    assert all((ROOT / file).exists() for file in re.findall(r"source/(\S+)", commands))

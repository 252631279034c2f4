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
        assert wanted == set(job.get("strategy", {}).get("matrix", {}))


def test_the_test_workflow_covers_the_oldest_and_the_newest_python():
    jobs = load("test")["jobs"]
    assert {"lint", "test", "docs"} == set(jobs)
    oldest = re.search(r'requires-python = ">=(.*)"', (ROOT / "pyproject.toml").read_text())
    assert oldest is not None
    assert jobs["test"]["strategy"]["matrix"]["python"] == [oldest[1], "3.14"]


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

"""Damage, full and read-only disks, and kills: one clear line each, and never a checkpoint lost."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from forks import Script
from rarefy.checkpoint.directory import (
    FILE_NAMES,
    CheckpointError,
    CheckpointParts,
    CheckpointWriter,
    load,
    newest_valid,
    save,
)

NOBODY = 65534


def parts(size: int = 8) -> CheckpointParts:
    return CheckpointParts(model={"w": torch.arange(size)}, state={"global_step": 1})


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    save(tmp_path, 1, parts())
    return save(tmp_path, 2, parts())


def edit(path: Path, **changes) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def assert_refused(path: Path, *expected: str) -> None:
    """One line with the path, the problem and the remedy; the checkpoint before it is found instead."""
    with pytest.raises(CheckpointError) as caught:
        load(path)
    message = str(caught.value)
    assert "\n" not in message and str(path) in message and "; " in message
    assert all(text in message for text in expected), message
    warnings: list[str] = []
    assert newest_valid(path.parent, warnings.append) == path.parent / "checkpoint_1"
    assert len(warnings) == 1 and message in warnings[0]


@pytest.mark.parametrize("name", FILE_NAMES)
@pytest.mark.parametrize(
    ("damage", "problem"),
    [(truncate, "is damaged: "), (flip, "its SHA-256 is not the one"), (Path.unlink, "is missing")],
)
def test_a_damaged_file_is_named(checkpoint, name, damage, problem):
    damage(checkpoint / name)
    assert_refused(checkpoint, name, problem, "use another checkpoint, or delete this one")


def test_a_missing_manifest(checkpoint):
    (checkpoint / "MANIFEST.json").unlink()
    assert_refused(checkpoint, "has no MANIFEST.json, so it is not a complete checkpoint")


@pytest.mark.parametrize("content", ["", "{", "[" * 100_000, "\x00\xff"])
def test_a_manifest_that_is_no_json(checkpoint, content):
    (checkpoint / "MANIFEST.json").write_text(content, encoding="latin-1")
    assert_refused(checkpoint, "MANIFEST.json: is not valid JSON")


@pytest.mark.parametrize("content", ["null", "[]", "{}", '{"format_version": "1"}'])
def test_a_manifest_without_a_version(checkpoint, content):
    (checkpoint / "MANIFEST.json").write_text(content)
    assert_refused(checkpoint, "MANIFEST.json: has no format_version")


@pytest.mark.parametrize(
    "changes", [{"files": 3}, {"files": {"model.safetensors": {}}}, {"step": "x"}, {"a": 1}]
)
def test_a_manifest_of_another_shape(checkpoint, changes):
    edit(checkpoint / "MANIFEST.json", **changes)
    assert_refused(checkpoint, "MANIFEST.json: is not a valid manifest (at ")


def test_a_manifest_that_lacks_a_file(checkpoint):
    edit(checkpoint / "MANIFEST.json", files={})
    assert_refused(checkpoint, "is not listed in MANIFEST.json")


def test_a_newer_format(checkpoint):
    edit(checkpoint / "MANIFEST.json", format_version=4, files={}, new_key=True)
    with pytest.raises(
        CheckpointError, match="has checkpoint format 4; this rarefy reads formats up to 3; upgrade"
    ):
        load(checkpoint)


def test_a_newer_format_is_not_passed_over_and_then_replaced(checkpoint):
    edit(checkpoint / "MANIFEST.json", format_version=4)
    with pytest.raises(CheckpointError, match="checkpoint format 4"):
        newest_valid(checkpoint.parent, pytest.fail)


def rewrite(path: Path, content: bytes) -> None:
    """Replaces a file and makes the manifest agree."""
    path.write_bytes(content)
    manifest = json.loads((path.parent / "MANIFEST.json").read_text())
    manifest["files"][path.name] = {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    (path.parent / "MANIFEST.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize(
    ("name", "content", "problem"),
    [
        ("state.json", b"{", "state.json: is not valid JSON"),
        ("state.json", b"[]", "state.json: has no format_version"),
        ("state.json", b'{"format_version": 9}', "state.json: has checkpoint format 9"),
        ("state.json", b'{"format_version": 1}', "does not fit state.json"),
        ("model.safetensors", b"nonsense", "model.safetensors: does not fit state.json"),
        ("params.yaml", b"a: [", "params.yaml: is not valid YAML"),
        ("params.yaml", b"!!python/object/apply:os.getcwd []", "params.yaml: is not valid YAML"),
    ],
)
def test_a_file_that_was_edited_consistently(checkpoint, name, content, problem):
    rewrite(checkpoint / name, content)
    with pytest.raises(CheckpointError) as caught:
        load(checkpoint)
    assert problem in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("make", [Path.mkdir, lambda path: path.write_text("x"), lambda path: None])
def test_a_path_that_is_no_checkpoint(tmp_path, make):
    make(tmp_path / "other")
    with pytest.raises(CheckpointError, match="give a checkpoint_<step> directory"):
        load(tmp_path / "other")


# ---- the file system refuses ----


def assert_first_survives(root: Path) -> None:
    assert sorted(path.name for path in root.iterdir()) == ["checkpoint_1"]
    assert load(root / "checkpoint_1").state == {"global_step": 1}


PRELUDE = "import os, resource, sys, torch, yaml; from pathlib import Path\n"
PRELUDE += "from rarefy.checkpoint.directory import *; root = Path(sys.argv[1])\n"


def succeeds(code: str, root: Path, folder: Path, *arguments: str) -> None:
    """Runs code as a program."""
    exit_code, _, complaints = Script(code, str(root), *arguments, folder=folder).end()
    assert exit_code == 0, complaints


def as_a_user(
    code: str, root: Path, folder: Path, *, uid: int | None = None, limit: int | None = None
) -> None:
    """Runs code in another process, as another user or with a limit on file sizes; it must succeed."""
    # yaml is imported by saving alone, and another user may not be able to read this one's packages.
    prelude = PRELUDE
    prelude += f"resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))\n" if limit else ""
    prelude += f"os.setuid({uid})\n" if uid is not None else ""
    succeeds(prelude + code, root, folder)


EXPECT_REFUSAL = """
for write in (lambda *a: save(root, *a), lambda *a: [(w := CheckpointWriter(root)).save_async(*a), w.wait()]):
    try:
        write(2, CheckpointParts(model={"w": torch.ones(100_000)}))
    except CheckpointError as error:
        assert "checkpoint_2: cannot be written: MESSAGE; free space or fix" in str(error), error
        assert "earlier" not in str(error) and chr(10) not in str(error)
    else:
        raise SystemExit("nothing was raised")
"""


def test_a_quota(tmp_path, tmp_path_factory):
    save(tmp_path, 1, parts())
    as_a_user(
        EXPECT_REFUSAL.replace("MESSAGE", "File too large"),
        tmp_path,
        tmp_path_factory.mktemp("said"),
        limit=100_000,
    )
    assert_first_survives(tmp_path)


def test_a_read_only_directory(tmp_path, tmp_path_factory):
    save(tmp_path, 1, parts())
    is_root = os.geteuid() == 0
    for directory in (tmp_path, *tmp_path.parents) if is_root else ():
        directory.chmod(directory.stat().st_mode | 0o055)
    tmp_path.chmod(0o555)
    try:
        refusal = EXPECT_REFUSAL.replace("MESSAGE", "Permission denied")
        said = tmp_path_factory.mktemp("said")
        as_a_user(refusal, tmp_path, said, uid=NOBODY if is_root else None)
    finally:
        tmp_path.chmod(0o755)
    assert_first_survives(tmp_path)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    root = tmp_path / "disk"
    root.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(root)]
    if shutil.which("mount") is None or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("mounting a small file system is not permitted here")
    yield root
    subprocess.run(["umount", str(root)], check=True)


def test_a_full_disk(small_disk):
    save(small_disk, 1, parts())
    with pytest.raises(CheckpointError, match="checkpoint_2: cannot be written: No space left on device"):
        save(small_disk, 2, parts(1_000_000))
    writer = CheckpointWriter(small_disk)
    writer.save_async(3, parts(1_000_000))
    with pytest.raises(CheckpointError, match="checkpoint_3: cannot be written: No space left on device"):
        writer.wait()
    assert_first_survives(small_disk)
    save(small_disk, 4, parts(1000))


def test_a_root_that_is_a_file(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(CheckpointError, match="cannot be written: File exists"):
        save(tmp_path / "file", 1, parts())


# ---- kills ----

KILLS = 12
KILL_LOOP = """
import os, random, signal, sys, time
import torch
from pathlib import Path
from rarefy.checkpoint.directory import *

torch.set_num_threads(1)
root, kills, random_delay = Path(sys.argv[1]), int(sys.argv[2]), random.Random(int(sys.argv[3]))

def parts(step, count):
    return CheckpointParts(model={"w": torch.full((200_000,), count)}, state={"step": step, "count": count})

def write_for_ever(start, ready):
    writer = CheckpointWriter(root, keep_last=1)
    for count in range(start + 1, start + 1_000_000):
        step = STEP
        if count == start + 3:
            os.write(ready, b"!")
        if kill % 2:
            writer.save_async(step, parts(step, count))
        else:
            save(root, step, parts(step, count), keep_last=1)

def refuse(message):
    raise SystemExit(message)

save(root, 0, parts(0, 0))
last = 0
for kill in range(kills):
    wait, ready = os.pipe()
    child = os.fork()
    if child == 0:
        write_for_ever(last, ready)
    os.read(wait, 1)
    time.sleep(random_delay.uniform(0.0, 0.05))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    newest = newest_valid(root, refuse)
    assert newest is not None, "no checkpoint left"
    found = load(newest)
    assert found.state["count"] > last and bool((found.model["w"] == found.state["count"]).all())
    last = found.state["count"]
save(root, last + 1, parts(last + 1, last + 1), keep_last=1)
assert sorted(path.name for path in root.iterdir()) == [f"checkpoint_{last + 1}"], list(root.iterdir())
"""


@pytest.mark.parametrize("step", ["count", "0"], ids=["new steps", "the same step"])
def test_a_kill_leaves_the_old_or_the_new_checkpoint(tmp_path, tmp_path_factory, step):
    code = KILL_LOOP.replace("STEP", step)
    succeeds(code, tmp_path, tmp_path_factory.mktemp("said"), str(KILLS), "0")


# Dies before its first, second, … change of a file or folder, until a write has no more of them.
DEATHS = """
import itertools, os, signal, sys
import torch
from pathlib import Path
from rarefy.checkpoint.directory import *

torch.set_num_threads(1)
root = Path(sys.argv[1])
CHANGES = {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "shutil.rmtree"}

def write(count):
    parts = CheckpointParts(model={"w": torch.full((10,), count)}, state={"count": count})
    save(root, STEP, parts, keep_last=1)

def die_before(change):
    left = iter(range(change))
    def hook(event, _):
        if event in CHANGES and next(left, None) is None:
            os.kill(os.getpid(), signal.SIGKILL)
    sys.addaudithook(hook)

def refuse(message):
    raise SystemExit(message)

count = 0
write(count)
last = count
for change in itertools.count():
    count += 1
    child = os.fork()
    if child == 0:
        die_before(change)
        write(count)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    newest = newest_valid(root, refuse)
    assert newest is not None, f"no checkpoint left by a kill before change {change}"
    found = load(newest).state["count"]
    assert found in (last, count), (found, last, count)
    last = found
    if status == 0:
        break
    assert os.WTERMSIG(status) == signal.SIGKILL, status
assert last == count and change > 15, (last, count, change)
assert [path.name for path in root.iterdir()] == [newest.name], list(root.iterdir())
"""


@pytest.mark.parametrize("step", ["count", "0"], ids=["new steps", "the same step"])
def test_a_kill_before_any_change_of_a_file_loses_nothing(tmp_path, tmp_path_factory, step):
    succeeds(DEATHS.replace("STEP", step), tmp_path, tmp_path_factory.mktemp("said"))


def test_the_interpreter_finishes_the_last_checkpoint_before_it_exits(tmp_path):
    code = 'CheckpointWriter(root).save_async(3, CheckpointParts(model={"w": torch.ones(1_000_000)}))'
    # A fresh interpreter, which ends as they do.
    subprocess.run([sys.executable, "-c", PRELUDE + code, str(tmp_path)], check=True)
    assert newest_valid(tmp_path, pytest.fail) == tmp_path / "checkpoint_3"

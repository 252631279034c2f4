"""The command line: flags, modes, messages, tables and exit codes."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

import tiny_run
from forks import Script
from rarefy.checkpoint.directory import load
from rarefy.cli.app import app
from rarefy.cli.overview import listing
from tiny_run import configuration, rarefy


@pytest.fixture
def params(tmp_path: Path) -> Path:
    return tiny_run.write(tmp_path, configuration(tmp_path))


def steps_saved(folder: Path) -> list[int]:
    return sorted(int(path.name.partition("_")[2]) for path in folder.glob("checkpoint_*"))


def test_run_trains_validates_saves_and_sums_up(params: Path) -> None:
    result = rarefy("run", params)
    assert result.exit_code == 0, result.output
    assert steps_saved(params.parent / "out") == [6]
    words = ["Plan", "rigl: 2 updates, from step 3 to step 6", "actual sparsity", "0.7500", "eval/loss"]
    for word in [*words, "steps per second", str(params.parent / "out")]:
        assert word in result.stdout


def test_a_comparison_with_the_dense_model(params: Path) -> None:
    result = rarefy("run", params, "--compare_dense", 2)
    assert result.exit_code == 0, result.output
    assert re.search(r"speed +\d+\.\d\d times that of the dense model \(2 steps of each", result.stdout)
    again = rarefy("run", params, "--compare_dense", 2)
    assert again.exit_code == 0 and "times that of" not in again.stdout
    assert rarefy("run", params, "--compare_dense", -1).exit_code == 2


def test_params_as_an_option(params: Path) -> None:
    assert rarefy("run", "-p", params, "--max_steps", 2).exit_code == 0
    assert steps_saved(params.parent / "out") == [2]


def test_running_again_has_nothing_to_do(params: Path) -> None:
    rarefy("run", params)
    result = rarefy("run", params)
    assert result.exit_code == 0
    assert "nothing to do: global step 6 of 6 is reached" in result.stderr


@pytest.mark.parametrize(
    ("flags", "path", "value"),
    [
        (["--max_steps", "3"], "loop.max_steps", 3),
        (["--num_steps", "3"], "loop.num_steps", 3),
        (["--num_epochs", "1"], "loop.num_epochs", 1),
        (["--eval_steps", "1"], "loop.eval_steps", 1),
        (["--logging", "warning"], "logging.log_level", "warning"),
        (["--target_device", "CPU"], "device", "CPU"),
        (["--disable_strict_checkpoint_loading"], "checkpoint.disable_strict_checkpoint_loading", True),
        (["--set", "trainer.init.optimizer.AdamW.lr=1e-3"], "optimizer.AdamW.lr", 1e-3),
        (["--set", "trainer.init.checkpoint.steps=2"], "checkpoint.steps", 2),
    ],
)
def test_flags_override_the_file(params: Path, flags: list[str], path: str, value: object) -> None:
    result = rarefy("run", params, *flags)
    assert result.exit_code == 0, result.output
    newest = max((params.parent / "out").glob("checkpoint_*"))
    here: Any = load(newest).params["trainer"]["init"]
    for key in path.split("."):
        here = here[key]
    assert here == value


def test_num_steps_and_num_epochs_replace_each_other(tmp_path: Path) -> None:
    params = tiny_run.write(tmp_path, configuration(tmp_path, loop={"num_epochs": 3}))
    assert rarefy("run", params, "--num_steps", 2).exit_code == 0
    assert steps_saved(tmp_path / "out") == [2]
    params = tiny_run.write(tmp_path, configuration(tmp_path, loop={"num_steps": 3}))
    assert rarefy("run", params, "--num_epochs", 1, "-o", tmp_path / "other").exit_code == 0
    assert steps_saved(tmp_path / "other") == [5]


def test_model_dir_flag(params: Path) -> None:
    assert rarefy("run", params, "-o", params.parent / "elsewhere").exit_code == 0
    assert steps_saved(params.parent / "elsewhere") == [6]
    assert not (params.parent / "out").exists()


def test_modes(params: Path) -> None:
    assert "eval/loss" not in rarefy("run", params, "-m", "train").stdout
    for arguments in (["run", params, "--mode", "eval"], ["validate", params]):
        result = rarefy(*arguments)
        assert result.exit_code == 0, result.output
        assert "eval/loss" in result.stdout
    assert "eval/loss" in rarefy("fit", params, "--max_steps", 8).stdout


def test_a_file_that_only_validates(tmp_path: Path) -> None:
    content = configuration(tmp_path)
    rarefy("run", tiny_run.write(tmp_path, content))
    data = content["trainer"].pop("fit")["val_dataloader"]
    content["trainer"]["validate"] = {"val_dataloader": data}
    result = rarefy("run", tiny_run.write(tmp_path, content))
    assert result.exit_code == 0, result.output
    assert "eval/loss" in result.stdout


def test_validate_all(tmp_path: Path) -> None:
    content = configuration(tmp_path, checkpoint={"steps": 3})
    data = {"data_processor": "./tiny.py:make_batches", "count": 1}
    content["trainer"]["validate_all"] = {
        "val_dataloaders": [data, {**data, "seed": 3}],
        "ckpt_paths": str(tmp_path / "out" / "checkpoint_*"),
    }
    params = tiny_run.write(tmp_path, content)
    rarefy("run", params)
    result = rarefy("validate_all", params)
    assert result.exit_code == 0, result.output
    assert "eval/0/loss" in result.stdout
    assert "eval/1/loss" in result.stdout


@pytest.mark.parametrize("mode", ["eval_all", "eval", "train"])
def test_a_mode_without_its_block(tmp_path: Path, mode: str) -> None:
    content = configuration(tmp_path)
    del content["trainer"]["fit"]
    result = rarefy("run", tiny_run.write(tmp_path, content), "-m", mode)
    assert result.exit_code == 2
    assert "a missing value is not allowed; give it for this mode" in result.stderr


def test_checkpoint_path(params: Path) -> None:
    rarefy("run", params, "--set", "trainer.init.checkpoint.steps=3")
    start = params.parent / "out" / "checkpoint_3"
    other = params.parent / "other"
    arguments = ["run", params, "--checkpoint_path", start, "-o", other]
    assert rarefy(*arguments).exit_code == 0
    assert steps_saved(other) == [6]
    result = rarefy(*arguments, "--load_checkpoint_states", "model", "-o", params.parent / "fresh")
    assert "took the model from" in result.stderr
    missing = rarefy("run", params, "--checkpoint_path", params.parent / "none")
    assert missing.exit_code == 2
    assert "does not exist" in missing.stderr


def test_load_states_are_checked(params: Path) -> None:
    result = rarefy("run", params, "--load_checkpoint_states", "optimizer")
    assert result.exit_code == 2
    assert (
        "--load_checkpoint_states: optimizer is not allowed; give all, model or model,optimizer"
        in result.stderr
    )


def test_validate_only_writes_nothing(params: Path) -> None:
    result = rarefy("run", params, "--validate_only")
    assert result.exit_code == 0, result.output
    for word in ("body.weight", "32 of 128", "fewer than two dimensions", "default filter", "rigl", "FLOP"):
        assert word in result.stdout
    assert "trainer is valid; nothing was written" in result.stdout
    assert not (params.parent / "out").exists()


def test_validate_only_shows_pattern_and_distribution(params: Path) -> None:
    block = "{sparsity: 0.5, param_filter: {body*t: {pattern: {n: 2, m: 4}}, middle*t: {pattern: {block: [4, 4]}}}}"
    result = rarefy("run", params, "--validate_only", "--set", f"trainer.init.sparsity={block}")
    assert result.exit_code == 0, result.output
    body, middle = (line for line in result.stdout.splitlines() if "static" in line and ".weight" in line)
    assert "64 of 128" in body and "{n: 2, m: 4}" in body
    assert "128 of 256" in middle and "{block: [4, 4]}" in middle
    block = "{sparsity: 0.9, distribution: erk}"
    result = rarefy("run", params, "--validate_only", "--set", f"trainer.init.sparsity={block}")
    assert "0.9315" in next(line for line in result.stdout.splitlines() if "middle.weight" in line)


def test_a_sparsity_that_is_not_n_of_m_is_one_line(params: Path) -> None:
    block = "{sparsity: 0.9, pattern: {n: 2, m: 4}}"
    result = rarefy("run", params, "--set", f"trainer.init.sparsity={block}")
    assert result.exit_code == 2
    assert result.stderr.count("\n") == 1
    assert "trainer.init.sparsity.sparsity: 0.9 is not allowed; give 0.5, which is 1 − n/m" in result.stderr


def test_verbose_names_every_parameter(params: Path) -> None:
    result = rarefy("run", params, "--validate_only", "--logging", "VERBOSE")
    lines = result.stderr.splitlines()
    assert "Sparsity filter matched: body.weight" in lines
    assert "Sparsity filter did not match: body.bias" in lines
    assert "Sparsity filter" not in rarefy("run", params, "--validate_only").stderr


def test_no_imports(params: Path) -> None:
    result = rarefy("run", params, "--no-imports")
    assert result.exit_code == 2
    assert "imports are off" in result.stderr


def test_warnings_are_single_lines(tmp_path: Path) -> None:
    sparsity = {"type": "set", "sparsity": 0.5, "update": {"freq": 3}}
    result = rarefy("run", tiny_run.write(tmp_path, configuration(tmp_path, sparsity)))
    assert result.stderr.count("Warning: trainer.init.sparsity.type is deprecated; write `algorithm`\n") == 1


def test_a_failure_while_running(tmp_path: Path) -> None:
    content = configuration(tmp_path, model={"name": "./tiny.py:Tiny", "fault": "broken"})
    params = tiny_run.write(tmp_path, content)
    result = rarefy("run", params)
    assert result.exit_code == 1
    assert result.stderr.endswith("Error: unexpected ValueError: broken (--logging DEBUG shows where)\n")
    assert "Traceback" not in result.output
    assert "Traceback" in rarefy("run", params, "--logging", "DEBUG").stderr


def test_gradients_that_stay_infinite(tmp_path: Path) -> None:
    content = configuration(
        tmp_path, optimizer={"SGD": {"lr": 1e30}}, loop={"max_steps": 50, "max_skipped_steps": 2}
    )
    result = rarefy("run", tiny_run.write(tmp_path, content))
    assert result.exit_code == 1
    assert "2 steps in a row were skipped" in result.stderr


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signals_save_and_set_the_exit_code(tmp_path: Path, number: int, code: int) -> None:
    model = {"name": "./tiny.py:Tiny", "signal": int(number)}
    result = rarefy("run", tiny_run.write(tmp_path, configuration(tmp_path, model=model)))
    assert result.exit_code == code
    assert steps_saved(tmp_path / "out") == [3]
    assert f"after step 3, saved in {tmp_path / 'out' / 'checkpoint_3'}" in result.stderr


def test_an_interrupted_run_from_a_given_checkpoint_says_how_to_go_on(tmp_path: Path) -> None:
    rarefy("run", tiny_run.write(tmp_path, configuration(tmp_path, loop={"num_steps": 1})))
    model = {"name": "./tiny.py:Tiny", "signal": int(signal.SIGTERM)}
    content = configuration(tmp_path, model=model, model_dir=str(tmp_path / "other"))
    start = tmp_path / "out" / "checkpoint_1"
    result = rarefy("run", tiny_run.write(tmp_path, content), "--checkpoint_path", start)
    assert result.exit_code == 143
    assert "give it as ckpt_path to go on from there" in result.stderr


def test_data_may_be_a_list_of_batches(tmp_path: Path) -> None:
    content = configuration(tmp_path)
    for block in content["trainer"]["fit"].values():
        block["data_processor"] = "./tiny.py:make_list"
    params = tiny_run.write(tmp_path, content)
    for command in (["run", params], ["validate", params]):
        result = rarefy(*command)
        assert result.exit_code == 0, result.output
        assert "eval/loss" in result.stdout


def test_paths_are_printed_as_they_are(tmp_path: Path) -> None:
    content = configuration(tmp_path, model={"name": "./tiny.py:M:"})
    result = rarefy("run", tiny_run.write(tmp_path, content))
    assert "tiny.py:M:" in result.stderr


def test_an_interrupt_while_importing() -> None:
    code = (
        "import sys\n"
        "class Stop:\n"
        "    def find_spec(self, name, *_):\n"
        "        if name == 'rarefy.cli.app': raise KeyboardInterrupt\n"
        "sys.meta_path.insert(0, Stop())\n"
        "from rarefy.cli import main\n"
        "main()\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (result.returncode, result.stderr) == (130, "Error: interrupted\n")


@pytest.mark.parametrize("asked", ["--help", "-h", "--version"])
def test_help_and_version_are_those_of_the_whole_app(asked: str) -> None:
    quick = CliRunner().invoke(listing(), [asked], prog_name="rarefy", env={"COLUMNS": "200"})
    whole = CliRunner().invoke(app, [asked], prog_name="rarefy", env={"COLUMNS": "200"})
    assert (quick.exit_code, quick.stdout) == (0, whole.stdout)


def test_help_needs_no_torch() -> None:
    code = (
        "import atexit, sys\n"
        "atexit.register(lambda: print('torch' in sys.modules, file=sys.stderr))\n"
        "sys.argv[1:] = ['--help']\n"
        "from rarefy.cli import main\n"
        "main()\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (result.returncode, result.stderr) == (0, "False\n")
    assert "Train and validate what PARAMS.yaml describes." in result.stdout


def test_an_interrupt_before_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("rarefy.cli.run.parse", interrupt)
    result = rarefy("run", tiny_run.write(tmp_path, configuration(tmp_path)))
    assert (result.exit_code, result.stderr) == (130, "Error: interrupted\n")


def test_a_file_is_needed() -> None:
    result = rarefy("run")
    assert result.exit_code == 2
    assert "a command without a file is not allowed" in result.stderr


def test_trainers_in_a_row(tmp_path: Path) -> None:
    both = trainers_in_a_row(tmp_path)
    result = rarefy("run", tiny_run.write(tmp_path, both))
    assert result.exit_code == 0, result.output
    sparse, dense = (load(tmp_path / name / "checkpoint_6").model for name in ("sparse", "dense"))
    assert "body.weight_mask" in sparse
    assert "body.weight_mask" not in dense
    again = rarefy("run", tmp_path / "params.yaml")
    assert "trainer[0].trainer has ended already" in again.stderr
    assert "trainer[1].trainer has ended already" in again.stderr


def test_the_second_trainer_starts_from_the_first(tmp_path: Path) -> None:
    both = trainers_in_a_row(tmp_path)
    both["trainer"][1]["trainer"]["init"]["optimizer"] = {"SGD": {"lr": 0.0}}
    rarefy("run", tiny_run.write(tmp_path, both))
    sparse, dense = (load(tmp_path / name / "checkpoint_6").model for name in ("sparse", "dense"))
    assert (sparse["body.weight"] == dense["body.weight"]).all()


def test_trainers_that_share_a_directory(tmp_path: Path) -> None:
    both = trainers_in_a_row(tmp_path)
    for index, entry in enumerate(both["trainer"]):
        entry["trainer"]["init"] |= {"model_dir": str(tmp_path / "out"), "sparsity": 0.5}
        entry["trainer"]["init"]["loop"] = {"max_steps": 4 * (index + 1)}
    params = tiny_run.write(tmp_path, both)
    assert rarefy("run", params).exit_code == 0
    assert steps_saved(tmp_path / "out") == [4, 8]
    assert "trainer[0].trainer has ended already" in rarefy("run", params).stderr


def test_model_dir_flag_for_trainers_in_a_row(tmp_path: Path) -> None:
    params = tiny_run.write(tmp_path, trainers_in_a_row(tmp_path))
    assert rarefy("run", params, "-o", tmp_path / "new").exit_code == 0
    assert steps_saved(tmp_path / "new" / "sparse") == [6]
    assert steps_saved(tmp_path / "new" / "dense") == [6]


def trainers_in_a_row(folder: Path) -> dict[str, Any]:
    sparse = configuration(folder, model_dir=str(folder / "sparse"))
    dense = configuration(folder, model_dir=str(folder / "dense"), loop={"num_steps": 6})
    dense["trainer"]["init"]["checkpoint"] = {"disable_strict_checkpoint_loading": True}
    dense["trainer"]["init"]["sparsity"] = None
    return {"trainer": [sparse, dense]}


def test_schema_is_json() -> None:
    result = rarefy("schema")
    assert result.exit_code == 0
    assert "trainer" in json.loads(result.stdout)["properties"]


def test_version() -> None:
    result = rarefy("--version")
    assert result.exit_code == 0
    assert result.stdout.strip() == version("rarefy")


def test_hdf5(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("many words " * 100)
    arguments = ["data", "hdf5", text, "-o", tmp_path / "data", "--max_sequence_length", 16]
    result = rarefy(*arguments)
    assert result.exit_code == 0, result.output
    assert [path.name for path in (tmp_path / "data").iterdir()] == ["data-00000.h5"]
    again = rarefy(*arguments)
    assert again.exit_code == 2
    assert "which is not an empty directory" in again.stderr


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_read_only_directory(params: Path) -> None:
    (params.parent / "out").mkdir(mode=0o500)
    result = rarefy("run", params)
    assert result.exit_code in (1, 2)
    assert result.stderr.count("\n") <= 3


def test_aliases_in_a_file_stay_apart(tmp_path: Path) -> None:
    content = yaml.safe_dump(configuration(tmp_path))
    params = tiny_run.write(tmp_path, yaml.safe_load(content))
    text = params.read_text().replace("fit:", "fit: &fit", 1)
    params.write_text(text)
    assert rarefy("run", params, "--set", "trainer.fit.train_dataloader.count=1").exit_code == 0


@pytest.mark.parametrize(
    ("old", "new", "line"),
    [
        ("freq: 3", "freq: 0", "freq: 0"),
        ("freq: 3", "frequ: 3", "frequ: 3"),
        ("lr: 0.01", "lr: fast", "lr: fast"),
        ("max_steps: 6", "maxsteps: 6", "maxsteps: 6"),
    ],
)
@pytest.mark.parametrize("command", ["run", "plot"])
def test_what_is_wrong_in_the_file_has_its_line(
    params: Path, old: str, new: str, line: str, command: str
) -> None:
    text = params.read_text().replace(old, new)
    params.write_text(text)
    number = next(at for at, one in enumerate(text.splitlines(), start=1) if line in one)
    if command == "plot" and "lr" in line:
        pytest.skip("plot builds no optimizer")
    result = rarefy(command, params)
    assert result.exit_code == 2
    assert f"Error: {params}, line {number}: trainer.init." in result.stderr


def test_what_a_flag_gave_has_no_line(params: Path) -> None:
    result = rarefy("run", params, "--set", "freq=0")
    assert result.stderr.splitlines() == [
        "--set freq is trainer.init.sparsity.update.freq",
        "Error: trainer.init.sparsity.update.freq: 0 is not allowed; give a whole number of steps ≥ 1 "
        "(example: freq: 100)",
    ]


def test_set_finds_the_one_key(params: Path) -> None:
    result = rarefy("run", params, "--set", "sparsity=0.5", "--set", "lr=1e-3")
    assert result.exit_code == 0, result.output
    init = load(params.parent / "out" / "checkpoint_6").params["trainer"]["init"]
    assert init["sparsity"]["sparsity"] == 0.5 and init["optimizer"]["AdamW"]["lr"] == 1e-3


def test_a_model_dir_stands_for_its_newest_valid_checkpoint(params: Path) -> None:
    rarefy("run", params, "--set", "checkpoint.steps=3")
    out = params.parent / "out"
    (out / "checkpoint_6" / "MANIFEST.json").unlink()
    result = rarefy("run", params, "-o", params.parent / "new", "--checkpoint_path", out, "--num_steps", 1)
    assert result.exit_code == 0, result.output
    assert f"{out}: its newest valid checkpoint is checkpoint_3" in result.stderr
    assert steps_saved(params.parent / "new") == [4]
    (params.parent / "empty").mkdir()
    result = rarefy("run", params, "--checkpoint_path", params.parent / "empty")
    assert result.exit_code == 2 and "empty: holds no valid checkpoint" in result.stderr


def test_a_shell_completes_commands_and_flags(tmp_path: Path) -> None:
    def completed(words: str) -> set[str]:
        line = {"_RAREFY_COMPLETE": "complete_bash", "COMP_WORDS": words, "COMP_CWORD": str(words.count(" "))}
        code = "import sys; sys.argv[0] = 'rarefy'; import rarefy.cli as c; c.main()"
        _, said, _ = Script(code, folder=tmp_path, environment=line).end()
        return set(said.split())

    assert {"run", "export", "report"} <= completed("rarefy ")
    assert completed("rarefy run --checkp") == {"--checkpoint_path"}


def test_a_run_keeps_freed_memory_and_a_preview_does_not(
    params: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []
    monkeypatch.setattr("rarefy.cli.run.keep_freed_memory", lambda: calls.append("kept"))
    assert rarefy("run", params, "--validate_only").exit_code == 0
    assert not calls
    assert rarefy("run", params, "--max_steps", 1).exit_code == 0
    assert calls == ["kept"]


def test_a_variable_that_means_nothing_is_one_line(params: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAREFY_MALLOC", "yes")
    result = rarefy("run", params)
    assert result.exit_code == 2
    assert "RAREFY_MALLOC: 'yes' is not allowed; give 0 or 1, or unset it" in result.stderr
    assert not steps_saved(params.parent / "out")

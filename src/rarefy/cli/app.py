"""The commands and their flags."""

import functools
import inspect
import json
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from rarefy.cli import bench, export, hdf5, options, prune
from rarefy.cli.guard import guarded
from rarefy.cli.look import compare, plot, report
from rarefy.cli.look import inspect as inspection
from rarefy.cli.overrides import Flags
from rarefy.cli.overview import new_app
from rarefy.cli.run import Request, run, run_with
from rarefy.run.launch import Mode
from rarefy.run.schema import json_schema

app, data_app = new_app()


def _run(
    params: options.Params = None,
    params_option: options.ParamsOption = None,
    mode: options.ModeOption = None,
    model_dir: options.ModelDir = None,
    checkpoint_path: options.CheckpointPath = None,
    load_checkpoint_states: options.LoadStates = None,
    resume: options.Resume = None,
    disable_strict_checkpoint_loading: options.Loose = None,
    max_steps: options.MaxSteps = None,
    num_steps: options.NumSteps = None,
    num_epochs: options.NumEpochs = None,
    eval_steps: options.EvalSteps = None,
    target_device: options.TargetDevice = None,
    logging: options.Logging = None,
    validate_only: options.ValidateOnly = False,
    compare_dense: options.CompareDense = 0,
    nproc: options.Processes = 1,
    imports: options.Imports = True,
    assignments: options.Assignments = None,
) -> None:
    """Train and validate what PARAMS.yaml describes."""
    flags = Flags(
        model_dir=model_dir,
        device=target_device,
        log_level=logging,
        max_steps=max_steps,
        num_steps=num_steps,
        num_epochs=num_epochs,
        eval_steps=eval_steps,
        checkpoint_path=checkpoint_path,
        load_checkpoint_states=load_checkpoint_states,
        resume=resume,
        disable_strict_checkpoint_loading=disable_strict_checkpoint_loading,
        assignments=tuple(assignments or ()),
    )
    request = Request(params or params_option, flags, mode, validate_only, imports, compare_dense)
    raise typer.Exit(run(request) if nproc == 1 else run_with(nproc, request))


def _with_mode(mode: Mode, text: str) -> Callable[..., None]:
    """The `run` command with a fixed mode."""
    signature = inspect.signature(_run)

    @functools.wraps(_run)
    def command(**flags: Any) -> None:
        _run(mode=mode, **flags)

    # typer makes a command's flags from the signature; a fixed mode is none of them.
    parameters = [one for one in signature.parameters.values() if one.name != "mode"]
    command.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    command.__doc__ = text
    return command


app.command("run")(_run)
app.command("fit")(
    _with_mode("train_and_eval", "The same as `run` with its validation, if the file has one.")
)
app.command("validate")(_with_mode("eval", "The same as `run --mode eval`."))
app.command("validate_all")(_with_mode("eval_all", "The same as `run --mode eval_all`."))


app.command("export")(export.command)
app.command("prune")(prune.command)
app.command("inspect")(inspection.command)
app.command("bench")(bench.command)
app.command("plot")(plot.command)
app.command("report")(report.command)
app.command("compare")(compare.command)


@app.command("schema")
def _schema() -> None:
    """Print the JSON schema of the configuration file, for editors."""
    typer.echo(json.dumps(json_schema(), indent=2))


@app.command("convert")
def _convert(
    params: Annotated[
        Path, typer.Argument(metavar="OLD.yaml", help="A file in the older form of the Model Zoo.")
    ],
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="Where to write the new form; without it, it is printed."),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace a file that exists.")] = False,
) -> None:
    """Write a file of the older form (train_input, model, optimizer, runconfig) in the new one (trainer)."""
    # The other commands do not need it.
    from rarefy.run.old_form import convert_file

    def write() -> None:
        text = convert_file(params, output, force)
        if output is None:
            typer.echo(text, nl=False)

    raise typer.Exit(guarded(write))


@data_app.command("hdf5")
def _hdf5(
    files: Annotated[list[Path], typer.Argument(metavar="FILES...", help="Text files.")],
    out_dir: Annotated[Path, typer.Option("--out_dir", "-o", help="A directory that does not exist yet.")],
    max_sequence_length: Annotated[int, typer.Option("--max_sequence_length", help="Tokens in a sample.")],
    tokenizer: Annotated[
        Path | None, typer.Option("--tokenizer", help="A tokenizer.json; without one, a byte is a token.")
    ] = None,
    form: Annotated[
        Literal["samples", "corpus"], typer.Option("--format", help="Ready samples, or one row of tokens.")
    ] = "samples",
    samples_per_file: Annotated[int, typer.Option("--samples_per_file", help="Samples in a file.")] = 10_000,
) -> None:
    """Turn text files into the HDF5 files that GptHDF5MapDataProcessor reads."""

    def write() -> None:
        hdf5.write(files, out_dir, max_sequence_length, tokenizer, form, samples_per_file)

    raise typer.Exit(guarded(write))

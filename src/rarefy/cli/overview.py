"""The list of commands, which can be printed without what they import: torch alone takes seconds."""

from importlib.metadata import version
from typing import Annotated

import typer

# The first line of what each says of itself.
COMMANDS = {
    "run": "Train and validate what PARAMS.yaml describes.",
    "fit": "The same as `run` with its validation, if the file has one.",
    "validate": "The same as `run --mode eval`.",
    "validate_all": "The same as `run --mode eval_all`.",
    "export": "Turn a checkpoint into a file or folder for other programs.",
    "prune": "Prune a trained model at once, without training.",
    "inspect": "Show every sparse weight of a checkpoint: sparsity, balance, dead rows and columns, |w|.",
    "bench": "Measure how many times faster sparse layers are than dense ones on this machine.",
    "plot": "Draw the sparsity and drop-fraction schedules of PARAMS.yaml, before any training.",
    "report": "Write one self-contained HTML file about a run.",
    "compare": "Show several runs beside each other: loss, sparsity, speed, one line a run.",
    "schema": "Print the JSON schema of the configuration file, for editors.",
    "convert": "Write a file of the older form (train_input, model, optimizer, runconfig) in the new one (trainer).",
}
# What needs no command.
ASKED = (["--help"], ["-h"], ["--version"])


def new_app() -> tuple[typer.Typer, typer.Typer]:
    """The app without commands, and the group `data` in it.

    Example:
        >>> new_app()[0].info.name
        'rarefy'
    """
    app = typer.Typer(
        name="rarefy",
        help="Train any PyTorch model with sparse weights, from one YAML file.",
        no_args_is_help=True,
        # Every fault becomes one line in `guarded`; what gets past it is a fault of ours, whose traceback should be
        # plain.
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"]},
    )
    app.callback()(_options)
    data_app = typer.Typer(name="data", help="Prepare data sets.", no_args_is_help=True)
    data_app.callback()(_data)
    app.add_typer(data_app)
    return app, data_app


def listing() -> typer.Typer:
    """An app that prints help and version as the whole one does, and has nothing behind its commands.

    Example:
        >>> [command.name for command in listing().registered_commands][0]
        'run'
    """
    app, _ = new_app()
    for name, text in COMMANDS.items():
        app.command(name, help=text)(_nothing)
    return app


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(version("rarefy"))
        raise typer.Exit


def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Train any PyTorch model with sparse weights, from one YAML file."""


def _data() -> None:
    """Prepare data sets."""


def _nothing() -> None:
    """What stands behind the commands of the listing."""

"""The arguments and flags that commands share; None where a flag was not given."""

from pathlib import Path
from typing import Annotated

from typer import Argument, Option

from rarefy.run.launch import Mode

_MODES = "What to do; train_and_eval where the file has a val_dataloader."
_START = "The checkpoint to start from, or the model_dir of another run for its newest one."
_STATES = "What to load of the checkpoint: all, model for weights and masks alone, or model,optimizer."
_RESUME = "as_saved: go on with the configuration in the checkpoint, flags and --set on top."
_LOOSE = "Load dense checkpoints in sparse runs and sparse ones in dense runs."
_LEVELS = "DEBUG, VERBOSE, INFO, WARNING, ERROR or CRITICAL."
_VALIDATE = "Check everything and print the plan; train nothing."
_COMPARE = "After the run, compare the speed over so many steps with that of a dense model."
_NPROC = "Train in so many processes of this machine, as torchrun does."
_CHECKPOINT = "A checkpoint, a model_dir (its newest checkpoint), or a safetensors, .pt or .mdl file."

Checkpoint = Annotated[Path, Argument(metavar="CHECKPOINT", help=_CHECKPOINT)]
Params = Annotated[Path | None, Argument(metavar="PARAMS.yaml", help="The configuration file.")]
ParamsOption = Annotated[Path | None, Option("--params", "-p", help="The same, as an option.")]
ModeOption = Annotated[Mode | None, Option("--mode", "-m", help=_MODES)]
ModelDir = Annotated[str | None, Option("--model_dir", "-o", help="Where logs and checkpoints go.")]
CheckpointPath = Annotated[str | None, Option("--checkpoint_path", help=_START)]
LoadStates = Annotated[str | None, Option("--load_checkpoint_states", help=_STATES)]
Resume = Annotated[str | None, Option("--resume", metavar="as_saved", help=_RESUME)]
Loose = Annotated[bool | None, Option("--disable_strict_checkpoint_loading", help=_LOOSE)]
MaxSteps = Annotated[int | None, Option("--max_steps", help="The global step to end at.")]
NumSteps = Annotated[int | None, Option("--num_steps", help="Optimizer steps to train.")]
NumEpochs = Annotated[int | None, Option("--num_epochs", help="Epochs to train.")]
EvalSteps = Annotated[int | None, Option("--eval_steps", help="Batches of a validation.")]
TargetDevice = Annotated[str | None, Option("--target_device", help="cpu, gpu or auto.")]
Logging = Annotated[str | None, Option("--logging", help=_LEVELS)]
ValidateOnly = Annotated[bool, Option("--validate_only", help=_VALIDATE)]
CompareDense = Annotated[int, Option("--compare_dense", metavar="STEPS", min=0, help=_COMPARE)]
Processes = Annotated[int, Option("--nproc", metavar="N", min=1, help=_NPROC)]
Imports = Annotated[bool, Option("--imports/--no-imports", help="Allow `package.module:name` in the file.")]
Assignments = Annotated[
    list[str] | None, Option("--set", metavar="KEY.PATH=VALUE", help="Change any value; repeatable.")
]

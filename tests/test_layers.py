"""The floor plan: a module imports only from floors below its own; functions and files stay small."""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

SOURCE = Path(__file__).parents[1] / "src" / "rarefy"
FLOORS = {
    "errors": 0,
    "validation": 1,
    "imports": 1,
    "disk": 1,
    "allocator": 1,
    "distributed": 1,
    "torch_private": 0,
    "yaml_files": 1,
    "decoder": 2,
    "architectures": 3,
    "models": 4,
    "data": 2,
    "schedules": 2,
    "distributions": 2,
    "kernels": 1,
    "checkpoint": 2,
    "optim": 2,
    "masks": 3,
    "schedule_schema": 3,
    "ties": 2,
    "roles": 3,
    "filters": 5,
    "tensors": 3,
    "nn": 4,
    "patterns": 4,
    "cost": 5,
    "initializers": 5,
    "saliency": 5,
    "first_masks": 6,
    "storage": 6,
    "algorithms": 7,
    "methods": 8,
    "config": 9,
    "inference": 9,
    "pruning": 10,
    "callbacks": 10,
    "trainer": 11,
    "run": 12,
    "integrations": 13,
    "export": 13,
    "report": 13,
    "cli": 14,
    "__main__": 15,
    "": 15,
}
FILES = sorted(SOURCE.rglob("*.py"))


def module_name(path: Path) -> str:
    parts = path.relative_to(SOURCE).with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__")


def floor_key(module: str) -> str:
    """The row of the floor plan that a module belongs to."""
    return module.split(".")[0]


def imported_modules(path: Path) -> set[str]:
    """The modules of rarefy that a file imports, for type checkers too; `from rarefy import masks` is `masks`."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names if alias.name.split(".")[0] == "rarefy"}
        elif isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "rarefy":
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                path_of = SOURCE.joinpath(*whole.split(".")[1:])
                is_module = path_of.is_dir() or path_of.with_suffix(".py").exists()
                found.add(whole if is_module else node.module)
    return {name.removeprefix("rarefy").lstrip(".") for name in found}


@pytest.mark.parametrize("path", FILES, ids=module_name)
def test_imports_go_down_only(path):
    mine = floor_key(module_name(path))
    for module in imported_modules(path):
        other = floor_key(module)
        if other == mine:
            continue
        assert FLOORS[other] < FLOORS[mine], (
            f"{mine} (floor {FLOORS[mine]}) imports {other} (floor {FLOORS[other]})"
        )


def test_modules_of_one_package_import_each_other_without_cycles():
    graph = {module_name(path): imported_modules(path) & {module_name(p) for p in FILES} for path in FILES}
    done: set[str] = set()

    def visit(module: str, trail: tuple[str, ...]) -> None:
        assert module not in trail, " → ".join((*trail, module))
        if module in done:
            return
        for other in graph[module]:
            visit(other, (*trail, module))
        done.add(module)

    for module in graph:
        visit(module, ())


def test_the_floor_plan_lists_what_exists():
    present = {floor_key(module_name(path)) for path in FILES} - {"__main__"}
    assert present <= set(FLOORS)


@pytest.mark.parametrize("path", FILES, ids=module_name)
def test_files_and_functions_are_small(path):
    text = path.read_text()
    assert text.count("\n") <= 400
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert (node.end_lineno or 0) - node.lineno < 80, f"{node.name} is too long"


def test_nearly_all_functions_are_under_60_lines_and_the_median_is_short():
    lengths = [
        (node.end_lineno or 0) - node.lineno + 1
        for path in FILES
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    ]
    assert sum(length < 60 for length in lengths) >= 0.95 * len(lengths)
    assert sorted(lengths)[len(lengths) // 2] <= 12


def attributes(path: Path) -> Iterator[str]:
    """Every name that a file reads or writes after a dot, or by `getattr` and the like as a string."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Attribute):
            yield node.attr
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value


def names_of_torch(wanted: Callable[[str], bool]) -> set[str]:
    """The names on torch's modules, tensors, optimizers and schedulers that are `wanted`."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=0.1)
    owners = (
        torch.nn.Module(),
        torch.nn.Parameter(torch.ones(1)),
        optimizer,
        torch.optim.lr_scheduler.StepLR(optimizer, 1),
        torch.amp.GradScaler("cpu"),
    )
    return {name for owner in owners for name in dir(owner) if wanted(name)}


# Who registers hooks with torch, and would have to know what a hook may do; the others are called by these.
REGISTRARS = {
    "algorithms.attachment.averaging",  # the forward passes of DistributedDataParallel
    "algorithms.attachment.following",  # optimizers
    "algorithms.attachment.gradient_hooks",  # the gradients of sparse weights
    "algorithms.attachment.keeper",  # files and copies of sparse weights
    "integrations.signed_zeros",  # files of Transformers
    "nn.inference_only",  # forward passes of a model that is not to be trained
    "nn.linear",  # files of a layer that is used without an algorithm
    "saliency.inputs",  # forward passes of a model that is measured
    "saliency.outputs",  # the same
    "tensors.gradient",  # the gradient of a sparse weight, to be gathered
    "trainer.beginning.carrying",  # an optimizer's state, before it is loaded
}


def test_few_files_register_hooks_with_torch():
    hooks = names_of_torch(lambda name: name.startswith("register_") and "hook" in name)
    assert {"register_hook", "register_state_dict_post_hook", "register_step_pre_hook"} <= hooks
    assert {module_name(path) for path in FILES if hooks & set(attributes(path))} == REGISTRARS


# Files that still use private names of torch themselves.
BORROWERS: set[str] = set()


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


def private_paths(path: Path) -> Iterator[str]:
    """Whatever a file takes from below `torch` that begins with an underscore somewhere: `torch._C`, `torch.x._y`."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Attribute):
            found = ast.unparse(node)
        elif isinstance(node, ast.ImportFrom) and node.module:
            found = ".".join([node.module, *(alias.name for alias in node.names)])
        else:
            continue
        if re.fullmatch(r"torch(\.\w+)+", found) and any(is_private(part) for part in found.split(".")):
            yield found


def foreign_attributes(path: Path) -> Iterator[str]:
    """`attributes` but for what a file itself sets on `self`: torch may use the name for another thing."""
    nodes = list(ast.walk(ast.parse(path.read_text())))
    on_self = [
        node
        for node in nodes
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "self"
    ]
    own = {node.attr for node in on_self if isinstance(node.ctx, ast.Store)}
    own |= {node.name for node in nodes if isinstance(node, ast.FunctionDef)}
    passed = {node for node in on_self if node.attr in own}
    for node in nodes:
        if isinstance(node, ast.Attribute) and node not in passed:
            yield node.attr
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value


def test_private_names_of_torch_stand_in_three_files():
    private = names_of_torch(is_private) | {"found_inf", "grad_scale"}
    assert {"_parameters", "_version", "_step_count", "_forward_pre_hooks", "_last_lr"} <= private
    guilty = {
        module_name(path): found
        for path in FILES
        if (found := (private & set(foreign_attributes(path))) | set(private_paths(path)))
    }
    homes = {"torch_private", "torch_private.ddp", "torch_private.replacing"}
    assert set(guilty) - homes == BORROWERS, guilty


def test_algorithm_files_are_short():
    files = [path for path in FILES if path.parent.name == "methods"]
    assert len(files) > 4
    assert all(path.read_text().count("\n") < 80 for path in files)


def test_no_pickle_and_no_id_keys():
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                assert "pickle" not in {alias.name for alias in node.names}, path
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
                assert node.func.id != "id", f"{path}:{node.lineno}"


SAME_CONCEPT = {
    "__main__": "what `python -m` starts, of the package and of its command line",
    "hdf5": "a data processor, and the command that writes its files",
    "hugging_face": "models that come from transformers, and models that go there",
    "options": "an algorithm's options, and a command's",
    "protocol": "what a model, and what a storage, has to offer",
    "registry": "names as they are written in YAML, of each kind of thing",
    "state": "what of an algorithm, and of a trainer, goes into a checkpoint",
}


def test_two_files_share_a_name_only_where_they_hold_the_same_concept():
    names = [path.stem for path in FILES if path.stem != "__init__"]
    twice = {name for name in names if names.count(name) > 1}
    assert twice <= set(SAME_CONCEPT)


def test_a_folder_holds_fifteen_files_at_most():
    folders = {path.parent for path in FILES}
    crowded = {folder.name for folder in folders if len(list(folder.glob("*.py"))) > 15}
    assert crowded == set()


def test_no_room_holds_more_than_a_tenth_of_the_code():
    lines = {path: path.read_text().count("\n") for path in FILES}
    rooms = {floor_key(module_name(path)) for path in FILES}
    sizes = {
        room: sum(lines[path] for path in FILES if floor_key(module_name(path)) == room) for room in rooms
    }
    room = max(sizes, key=sizes.__getitem__)
    assert 10 * sizes[room] <= sum(lines.values()), f"{room} has {sizes[room]} lines; make it two rooms"


def test_an_assignment_binds_one_value_unless_it_swaps():
    packed = []
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text())):
            match node:
                case ast.Assign(targets=[ast.Tuple(elts=targets)], value=ast.Tuple(elts=values)):
                    is_swap = {ast.unparse(one) for one in targets} == {ast.unparse(one) for one in values}
                    packed += [] if is_swap else [f"{module_name(path)}:{node.lineno}"]
    assert not packed

"""Learning rates in closed form, and the block that asks for them."""

import math

import pytest
import torch
from torch import nn

from rarefy.errors import ConfigError
from rarefy.optim.lr_schedules import ConstantLR, CosineDecayLR, LinearLR
from rarefy.optim.lr_sequences import SequentialLR
from rarefy.optim.schedulers import build_schedulers, first_learning_rate, read_schedulers

LINEAR = {"initial_learning_rate": 1.0, "end_learning_rate": 0.0, "total_iters": 4}


def optimizer(groups: int = 1) -> torch.optim.Optimizer:
    return torch.optim.SGD([{"params": [nn.Parameter(torch.ones(1))]} for _ in range(groups)], lr=9.0)


def rates(config: dict, steps: int) -> list[float]:
    [schedule] = read_schedulers(config)
    return [schedule.rate(step) for step in range(steps)]  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"ConstantLR": {"learning_rate": 0.3}}, [0.3] * 6),
        ({"LinearLR": LINEAR}, [1.0, 0.75, 0.5, 0.25, 0.0, 0.0]),
        ({"LinearLR": {"initial_learning_rate": 0, "end_learning_rate": 2, "total_iters": 2}}, [0, 1, 2, 2]),
        ({"PolynomialLR": {**LINEAR, "power": 2.0}}, [1.0, 0.5625, 0.25, 0.0625, 0.0, 0.0]),
        ({"CosineDecayLR": LINEAR}, [0.5 * (1 + math.cos(math.pi * t / 4)) for t in range(5)] + [0.0]),
        ({"CosineDecayLR": {**LINEAR, "end_learning_rate": 0.5}}, [1.0, 0.926777, 0.75, 0.573223, 0.5, 0.5]),
        (
            {"CosineAnnealingLR": {"initial_learning_rate": 1.0, "T_max": 2, "eta_min": 0.2}},
            [1, 0.6, 0.2, 0.6, 1],
        ),
        ({"CosineAnnealingWarmRestarts": {"initial_learning_rate": 1.0, "T_0": 2}}, [1, 0.5, 1, 0.5]),
        (
            {"ExponentialLR": {"initial_learning_rate": 1.0, "decay_rate": 0.25, "total_iters": 2}},
            [1, 0.5, 0.25, 0.125],
        ),
        (
            {
                "ExponentialLR": {
                    "initial_learning_rate": 1,
                    "decay_rate": 0.25,
                    "total_iters": 2,
                    "staircase": True,
                }
            },
            [1, 1, 0.25, 0.25],
        ),
        (
            {
                "InverseExponentialTimeDecayLR": {
                    "initial_learning_rate": 1.0,
                    "step_exponent": 2,
                    "total_iters": 4,
                    "decay_rate": 1.0,
                }
            },
            [1, 0.8, 0.5, 4 / 13],
        ),
        (
            {
                "InverseExponentialTimeDecayLR": {
                    "initial_learning_rate": 1.0,
                    "step_exponent": 1,
                    "total_iters": 2,
                    "decay_rate": 1.0,
                    "staircase": True,
                }
            },
            [1, 1, 0.5, 0.5],
        ),
        ({"InverseSquareRootDecayLR": {"scale": 2.0, "warmup_steps": 4}}, [1, 1, 1, 1, 1, 2 / math.sqrt(5)]),
        ({"StepLR": {"initial_learning_rate": 1.0, "step_size": 2, "gamma": 0.5}}, [1, 1, 0.5, 0.5, 0.25]),
        (
            {"MultiStepLR": {"initial_learning_rate": 1.0, "gamma": 0.5, "milestones": [1, 3]}},
            [1, 0.5, 0.5, 0.25],
        ),
        ({"PiecewiseConstantLR": {"learning_rates": [3, 2, 1], "milestones": [1, 3]}}, [3, 2, 2, 1, 1]),
        (
            {
                "SequentialLR": {
                    "schedulers": [
                        {
                            "LinearLR": {
                                "initial_learning_rate": 0.0,
                                "end_learning_rate": 1.0,
                                "total_iters": 2,
                            }
                        },
                        {"CosineDecayLR": {**LINEAR, "total_iters": 2}},
                        {"ConstantLR": {"learning_rate": 0.1}},
                    ]
                }
            },
            [0, 0.5, 1, 0.5, 0.1, 0.1],
        ),
        (
            {
                "SequentialLR": {
                    "schedulers": [{"ConstantLR": {"learning_rate": 1.0}}, {"LinearLR": LINEAR}],
                    "milestones": [3],
                }
            },
            [1, 1, 1, 1, 0.75, 0.5],
        ),
    ],
)
def test_closed_forms(config: dict, expected: list[float]) -> None:
    assert rates(config, len(expected)) == pytest.approx(expected, abs=1e-6)


def test_optimizer_step_k_uses_the_rate_of_k_minus_1_in_every_group() -> None:
    sgd = optimizer(groups=2)
    [scheduler] = build_schedulers({"LinearLR": LINEAR}, sgd)
    used = []
    for _ in range(5):
        used.append([group["lr"] for group in sgd.param_groups])
        sgd.step()
        scheduler.step()
    assert used == [[rate] * 2 for rate in (1.0, 0.75, 0.5, 0.25, 0.0)]


def test_state_is_the_step_and_the_configuration_decides_the_rest() -> None:
    [first] = build_schedulers({"LinearLR": LINEAR}, sgd := optimizer())
    sgd.step()
    first.step()
    second_optimizer = optimizer()
    [second] = build_schedulers({"LinearLR": {**LINEAR, "total_iters": 2}}, second_optimizer)
    second.load_state_dict(first.state_dict())
    assert second_optimizer.param_groups[0]["lr"] == second.get_last_lr()[0] == 0.5
    second_optimizer.step()
    second.step()
    assert second_optimizer.param_groups[0]["lr"] == 0.0


def test_rates_reach_learning_rates_that_are_tensors() -> None:
    adam = torch.optim.Adam(
        [nn.Parameter(torch.ones(1))], lr=torch.tensor(9.0), foreach=False, capturable=False
    )
    [scheduler] = build_schedulers({"LinearLR": LINEAR}, adam)
    scheduler.load_state_dict({"last_epoch": 2})
    assert adam.param_groups[0]["lr"].item() == 0.5


def test_names_are_case_insensitive_and_torch_has_the_others() -> None:
    assert isinstance(read_schedulers([{"cosinedecaylr": LINEAR}])[0], CosineDecayLR)
    sgd = torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=0.1, momentum=0.9)
    [cycle] = build_schedulers([{"onecyclelr": {"max_lr": 0.5, "total_steps": 10}}], sgd)
    assert isinstance(cycle, torch.optim.lr_scheduler.OneCycleLR)
    [step] = build_schedulers([{"torch.optim.lr_scheduler:StepLR": {"step_size": 3}}], sgd)
    assert isinstance(step, torch.optim.lr_scheduler.StepLR)
    assert read_schedulers(None) == []


def test_schedules_are_factories_in_python_too() -> None:
    both = SequentialLR(schedulers=[LinearLR(**LINEAR), ConstantLR(learning_rate=0.5)])
    assert both(optimizer()).get_last_lr() == [1.0]
    assert read_schedulers([{"SequentialLR": {"schedulers": [LinearLR(**LINEAR)]}}]) == [
        SequentialLR(schedulers=[LinearLR(**LINEAR)])
    ]


def test_first_learning_rate() -> None:
    assert first_learning_rate(read_schedulers({"LinearLR": LINEAR})) == 1.0
    assert first_learning_rate(read_schedulers({"OneCycleLR": {"max_lr": 1.0, "total_steps": 2}})) is None
    assert first_learning_rate([]) is None


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (5, "schedulers: 5 is not allowed; give a list of maps"),
        ("LinearLR", "schedulers: 'LinearLR'"),
        ([5], "schedulers[0]: 5"),
        ([{"LinearLR": LINEAR, "ConstantLR": {"learning_rate": 1.0}}], "schedulers[0]: {"),
        ([{"LinearLR": 3}], "schedulers[0].LinearLR: 3"),
        ([{"LineerLR": LINEAR}], "did you mean LinearLR?"),
        ([{"LinearLR": {}}], "schedulers[0].LinearLR.total_iters: a missing value"),
        ([{"LinearLR": {**LINEAR, "total_iters": 0}}], "schedulers[0].LinearLR.total_iters: 0"),
        ([{"LinearLR": {**LINEAR, "total_iters": 2.5}}], "schedulers[0].LinearLR.total_iters: 2.5"),
        ([{"LinearLR": {**LINEAR, "initial_learning_rate": -1.0}}], "LinearLR.initial_learning_rate: -1.0"),
        (
            [{"LinearLR": {**LINEAR, "initial_learning_rate": "fast"}}],
            "LinearLR.initial_learning_rate: 'fast'",
        ),
        ([{"LinearLR": {**LINEAR, "end_learning_rat": 0.0}}], "did you mean end_learning_rate?"),
        ([{"ConstantLR": {"learning_rate": 1.0}}, {"LinearLR": LINEAR}], "more than one schedule"),
        (
            [
                {
                    "SequentialLR": {
                        "schedulers": [{"ConstantLR": {"learning_rate": 1.0}}, {"LinearLR": LINEAR}]
                    }
                }
            ],
            "schedulers[0].SequentialLR.schedulers[0]: a schedule without total_iters",
        ),
        (
            [{"SequentialLR": {"schedulers": [{"LinearLR": LINEAR}], "milestones": [3]}}],
            "schedulers[0].SequentialLR.milestones: 1 for 1 schedules",
        ),
        (
            [{"SequentialLR": {"schedulers": [{"OneCycleLR": {"max_lr": 1.0, "total_steps": 2}}]}}],
            "schedulers[0].SequentialLR.schedulers[0]: {'OneCycleLR'",
        ),
        ([{"SequentialLR": {"schedulers": []}}], "schedulers[0].SequentialLR.schedulers: []"),
        ([{"SequentialLR": {"schedulers": 3}}], "schedulers[0].SequentialLR.schedulers: 3"),
        (
            [{"MultiStepLR": {"initial_learning_rate": 1.0, "gamma": 0.5, "milestones": [3, 2]}}],
            "schedulers[0].MultiStepLR.milestones: [3, 2] is not allowed; give a rising list of steps",
        ),
        (
            [{"PiecewiseConstantLR": {"learning_rates": [1.0], "milestones": [2]}}],
            "schedulers[0].PiecewiseConstantLR.learning_rates: 1 for 1 milestones",
        ),
    ],
)
def test_bad_blocks_are_named(config: object, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        read_schedulers(config)
    assert message in str(error.value)


def test_what_torch_refuses_is_named_when_built() -> None:
    for options in ({"max_lr": 1.0}, {"max_lr": 1.0, "total_steps": 5, "speed": 3}):
        with pytest.raises(ConfigError, match=r"schedulers\[0\].OneCycleLR: .* what OneCycleLR takes"):
            build_schedulers([{"OneCycleLR": options}], optimizer())
    with pytest.raises(ConfigError, match="returns a torch LRScheduler"):
        build_schedulers([{"builtins:id": {}}], optimizer())


def test_import_paths_may_be_refused() -> None:
    with pytest.raises(ConfigError, match="imports are off"):
        read_schedulers([{"torch.optim.lr_scheduler:StepLR": {}}], allow_imports=False)

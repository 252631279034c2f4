"""The same file in 1, 2 and 4 processes, under both strategies: the same masks, and the same losses up to rounding."""

from __future__ import annotations

import itertools
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch.distributed as dist
from torch import Tensor, nn

from ranks import NEEDS_FULLY_SHARD, in_processes
from rarefy.callbacks import Callback
from rarefy.models import build_model
from rarefy.run.builder import Builder
from rarefy.run.schema import parse

STEPS, WORLDS, STRATEGIES = 6, (2, 4), ("ddp", "fsdp2")
pytestmark = NEEDS_FULLY_SHARD
UPDATE = {"freq": 2, "stop": 5}
DYNAMIC = {"sparsity": 0.7, "update": UPDATE}
GROWING = {"type": "linear", "init": 0.2, "slope": 0.06}
# One weight after the other, as a step costs the same whatever becomes sparse in which way.
EACH: dict[str, dict[str, Any]] = {
    "*layers.0.*proj_q*weight": {"algorithm": "static", "sparsity": 0.7},
    "*layers.0.*proj_k*weight": {"algorithm": "gmp", "sparsity": GROWING, "update": UPDATE},
    "*layers.0.*proj_v*weight": {"algorithm": "set", **DYNAMIC, "compute": "compact"},
    "*layers.0.*proj_output*weight": {"algorithm": "rigl", **DYNAMIC, "compute": "masked"},
    "*layers.0.*ffn*weight": {"algorithm": "rigl", **DYNAMIC, "distribution": "erk"},
    "*layers.1.*proj_q*weight": {
        "algorithm": "rigl",
        "sparsity": 0.5,
        "update": UPDATE,
        "pattern": {"n": 2, "m": 4},
    },
    "*layers.1.*proj_k*weight": {"algorithm": "rigl", **DYNAMIC, "balance_out_groups": 4},
    "*layers.1.*proj_v*weight": {"algorithm": "rigl", **DYNAMIC, "compute": "compact"},
    "*layers.1.*proj_output*weight": {"algorithm": "mest", **DYNAMIC, "drop_fraction": 0.3},
    "*layers.1.*ffn*weight": {
        "algorithm": "set",
        **DYNAMIC,
        "pattern": {"block": [8, 8]},
        "compute": "compact",
    },
}
MIXED = [{**block, "param_filter": pattern} for pattern, block in EACH.items()]
SPARSITIES: dict[str, list[dict[str, Any]]] = {
    "each": MIXED,
    "accumulation": [{"algorithm": "rigl", **DYNAMIC, "compute": "compact"}],
    "bf16": [{"algorithm": "static", "sparsity": 0.7, "compute": "compact"}],
    "measured": [{"algorithm": "rigl", **DYNAMIC, "init_method": {"name": "snip", "batches": 2}}],
    # Begun and taken up under different strategies, of which one knows masked storage alone.
    "resumed": [{**block, "compute": "masked"} for block in MIXED],
}
MODELS = {"each": "Deep", "resumed": "Deep", "bf16": "Single"}
LOOPS: dict[str, dict[str, Any]] = {"accumulation": {"grad_accum_steps": 2}}
SIZES = {
    "vocab_size": 256,
    "max_position_embeddings": 8,
    "hidden_size": 16,
    "num_heads": 2,
    "filter_size": 32,
    "dropout_rate": 0.0,
    "attention_dropout_rate": 0.0,
}


def masked(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """Which labels count depends on the sample alone."""
    return {**batch, "attention_mask": (batch["input_ids"] % 3 > 0).long()}


class Double(nn.Module):
    """A decoder in float64, with masked tokens, so that each process has another number of them."""

    layers: ClassVar[int] = 1
    decoder: Any

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.decoder = build_model({"name": "gpt2", **SIZES, "num_hidden_layers": self.layers}).double()

    def forward(self, batch: dict[str, Tensor]) -> Any:
        return self.decoder(masked(batch))

    def parts_of(self, batch: dict[str, Tensor], size: int) -> Any:
        return self.decoder.parts_of(masked(batch), size)


class Deep(Double):
    """With a layer more."""

    layers: ClassVar[int] = 2


class Single(Double):
    """The same in float32."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.float()


class Record(Callback):
    """What every step did, and the fingerprints of the masks after it."""

    def __init__(self) -> None:
        self.metrics: list[tuple[float, float]] = []
        self.masks: list[dict[str, int]] = []

    def on_train_batch_end(self, trainer: Any, metrics: dict[str, float]) -> None:
        self.metrics.append((metrics["loss"], metrics["grad_norm"]))
        self.masks.append(
            {
                name: one.storage.fingerprint
                for algorithm in trainer.sparsity.algorithms
                for name, one in algorithm.parameters.items()
            }
        )


def run(folder: Path, case: str, strategy: str = "auto", steps: int = STEPS) -> Record:
    """Trains what a file of this case says, as one of however many processes there are."""
    # Under fsdp2 there is masked storage alone.
    hidden = {"compute"} if strategy == "fsdp2" else set()
    sparsity = [{key: one for key, one in block.items() if key not in hidden} for block in SPARSITIES[case]]
    init = {
        "seed": 1,
        "device": "cpu",
        "model_dir": str(folder / case),
        "model": {"name": f"{__file__}:{MODELS.get(case, 'Double')}"},
        "optimizer": {"SGD": {"lr": 0.05 if case == "bf16" else 0.5, "momentum": 0.9}},
        "sparsity": sparsity,
        "parallel": {"strategy": strategy},
        "loop": {"max_steps": steps, **LOOPS.get(case, {})},
        "precision": {"enabled": case == "bf16", "max_gradient_norm": 1.0},
    }
    data = {
        "data_processor": "TextCorpusDataProcessor",
        "source": str(folder / "a.txt"),
        "sequence_length": 8,
        "batch_size": 8,
    }
    [config] = parse({"trainer": {"init": init, "fit": {"train_dataloader": data}}})
    builder = Builder(config, folder)
    record = Record()
    trainer = builder.trainer(more_callbacks=[record], quiet=True)
    trainer.fit(builder.train_data)
    return record


def work(folder: Path, rank: int) -> dict[tuple[str, str], tuple[Any, Any]]:
    """Every case; the run that goes on is begun by two processes, and taken up by four under the other strategy."""
    found = {}
    world = dist.get_world_size()
    for strategy, case in itertools.product(STRATEGIES, SPARSITIES):
        half = case == "resumed" and world == WORLDS[0]
        begun = strategy if world == WORLDS[0] else next(one for one in STRATEGIES if one != strategy)
        place = folder / (begun if case == "resumed" else f"{strategy} {world}")
        place.mkdir(exist_ok=True)
        (place / "a.txt").write_bytes(TEXT)
        dist.barrier()
        record = run(place, case, strategy, STEPS // 2 if half else STEPS)
        found[strategy, case] = record.metrics, record.masks
    return found


TEXT = bytes((7 * place * place + place // 5) % 256 for place in range(4000))


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Any]:
    """What all processes of each world found."""
    folder = tmp_path_factory.mktemp("runs")
    return {
        world: in_processes(world, partial(work, folder), tmp_path_factory.mktemp(str(world)))
        for world in WORLDS
    }


def assert_same(
    found: tuple[Any, Any], alone: Record, steps: slice, rounding: float, norm_rounding: float
) -> None:
    metrics, masks = found
    assert len(metrics) == len(alone.metrics[steps])
    for (loss, norm), (expected_loss, expected_norm) in zip(metrics, alone.metrics[steps], strict=True):
        assert loss == pytest.approx(expected_loss, rel=rounding)
        assert norm == pytest.approx(expected_norm, rel=norm_rounding)
    assert masks == alone.masks[steps]


@pytest.mark.parametrize("case", SPARSITIES)
def test_any_number_of_processes_learns_the_same(case: str, results: dict[int, Any], tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(TEXT)
    alone = run(tmp_path, case)
    updates = sum(before != after for before, after in zip(alone.masks, alone.masks[1:], strict=False))
    assert updates == (0 if case == "bf16" else 2)
    for (world, ranks), strategy in itertools.product(results.items(), STRATEGIES):
        half = {2: slice(0, STEPS // 2), 4: slice(STEPS // 2, STEPS)}[world]
        for rank in ranks:
            steps = half if case == "resumed" else slice(None)
            # Sums of bfloat16 products round in another way where they are of fewer samples. Otherwise a loss that is
            # told is a float32, and a norm of gradients a float64, which shows any gradient that is not the mean.
            roundings = (1e-2, 1e-2) if case == "bf16" else (1e-6, 1e-9)
            assert_same(rank[strategy, case], alone, steps, *roundings)

"""benchmarks/block_layers.py: what it prints on the CPU, and what it does about GPUs."""

from __future__ import annotations

from collections.abc import Iterator

import block_layers
import pytest
import torch


@pytest.fixture(autouse=True)
def settings() -> Iterator[None]:
    threads = torch.get_num_threads()
    precision = torch.get_float32_matmul_precision()
    yield
    torch.set_num_threads(threads)
    torch.set_float32_matmul_precision(precision)


def test_a_table_of_the_cpu(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(block_layers, "LAYERS", [(32, 64, 8)])
    monkeypatch.setattr(block_layers, "keep_freed_memory", lambda: True)  # of this process, for good
    few = ["--rounds", "1", "--blocks", "16x16", "--sparsities", "0.5", "0.75", "--dtypes", "float32"]
    block_layers.main([*few, "--threads", "1"])
    machine, heading, layer, cells = capsys.readouterr().out.splitlines()
    assert "1 threads, CPU time" in machine and heading == "times faster than dense at 50% / 75%"
    assert layer.startswith("[32,64] x 8 torch.float32: dense ")
    name, ratios = cells.split(":")
    assert name == "  16x16" and len([float(ratio) for ratio in ratios.split("/")]) == 2


def test_a_gpu_without_kernels_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(block_layers, "obstacle", lambda device: f"no kernels on {device}")
    with pytest.raises(SystemExit, match=r"^--device cuda: no kernels on cuda$"):
        block_layers.main(["--device", "cuda"])


def test_other_devices_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        block_layers.main(["--device", "mps"])
    assert "invalid choice: 'mps'" in capsys.readouterr().err


def test_the_line_above_the_table_says_how_a_gpu_multiplies_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(block_layers, "obstacle", lambda device: "")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "A GPU")
    torch.set_float32_matmul_precision("high")
    assert block_layers.place(torch.device("cuda")) == "A GPU, float32 as tf32"


def test_a_gpu_is_waited_for_once_in_ten_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: calls.append("wait"))
    block_layers.waited_for(lambda: calls.append("step"))()
    assert calls == ["step"] * 10 + ["wait"]

"""The line of a file on which a key or value stands."""

from __future__ import annotations

import pytest

from rarefy.yaml_files.yaml_lines import line_of

TEXT = """\
shared: &shared
  freq: 100
trainer:
  init:
    sparsity:
      - param_filter:
          "*.weight": {seed: 1}
      - algorithm: rigl
        update:
          <<: *shared
          stop: 5
    optimizer: {torch.optim:SGD: {lr: 1}}
"""


@pytest.mark.parametrize(
    ("path", "key", "line"),
    [
        ("trainer", "", 3),
        ("trainer.init.sparsity", "", 5),
        ("trainer.init.sparsity[0].param_filter.*.weight.seed", "", 7),
        ("trainer.init.sparsity[1].update.stop", "", 11),
        ("trainer.init.sparsity[1].update.freq", "", 2),
        ("trainer.init.sparsity[1]", "algorithm", 8),
        ("trainer.init.sparsity[1].update.start", "", 9),
        ("trainer.init.sparsity[7].update", "", 5),
        ("trainer.init.optimizer.torch.optim:SGD.lr", "", 12),
        ("trainer.init", "no such key", 4),
        ("", "shared", 1),
        ("--checkpoint_path", "", None),
        ("", "", None),
    ],
)
def test_the_nearest_thing_that_the_file_has(path: str, key: str, line: int | None) -> None:
    assert line_of(TEXT, path, key) == line


def test_text_that_is_no_yaml_has_no_lines() -> None:
    assert line_of("a: [", "a") is None

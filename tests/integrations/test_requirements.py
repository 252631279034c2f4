"""Packages that only an adapter needs: found if they are there, named if they are not."""

from __future__ import annotations

import sys
from types import ModuleType

import pytest

from rarefy.errors import RarefyError
from rarefy.imports import require


def test_the_first_that_can_be_imported():
    assert require("x", "no_such_package", "json", "csv").__name__ == "json"


def test_one_in_use_comes_before_the_others(monkeypatch):
    used = ModuleType("used_by_the_user")
    monkeypatch.setitem(sys.modules, "used_by_the_user", used)
    monkeypatch.delitem(sys.modules, "wave", raising=False)
    assert require("x", "wave", "used_by_the_user") is used


def test_none(monkeypatch):
    for name in ("pytorch_lightning", "lightning", "lightning.pytorch"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(RarefyError, match=r"pytorch_lightning.*lightning.*pip install 'rarefy\[lightning\]'"):
        require("lightning", "pytorch_lightning", "lightning.pytorch")

"""The public names are there, lazily, whatever was imported before."""

from __future__ import annotations

import importlib
import subprocess
import sys

import torch

import cosettle_cache


def test_every_public_name_resolves() -> None:
    for name in cosettle_cache.__all__:
        assert getattr(cosettle_cache, name) is not None
    assert set(cosettle_cache.__all__) <= set(dir(cosettle_cache))


def test_importing_the_package_imports_nothing_heavy() -> None:
    code = "import sys, cosettle_cache; sys.exit(bool({'torch', 'zarr', 'numpy'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_propagate_is_callable_even_when_its_room_was_imported() -> None:
    importlib.import_module("cosettle_cache.propagation")
    tokens, labels = torch.randn(3, 4, 5, 8), torch.rand(4, 5, 2)
    maps = cosettle_cache.propagate(tokens, labels, cosettle_cache.make_protocol("cosettle"))
    assert maps.shape == (3, 4, 5, 2)

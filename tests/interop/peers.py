"""The original implementations, which are not installed everywhere."""

import importlib
import types
import warnings

import pytest


def imported(name: str, how: str = "pip install -e .[peers]") -> types.ModuleType:
    """A module of the original implementations, or the test is skipped."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # theirs, at import
        try:
            return importlib.import_module(name)
        except ImportError:
            pytest.skip(f"{name} is not installed ({how})")

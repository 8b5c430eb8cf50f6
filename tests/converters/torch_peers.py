"""timm and torchscale for tests, which are installed without the packages that pull another torch."""

import contextlib
import importlib
import importlib.abc
import importlib.machinery
import sys
import types
import warnings
from typing import Any

import pytest

# What timm and torchscale import at the top and do not need for the models tested here.
_ABSENT = ("torchvision", "fairscale")


class _Names(type):
    """A class whose attributes are their names, in the way of an enumeration."""

    def __getattr__(cls, name: str) -> str:
        if name.startswith("__"):
            raise AttributeError(name)
        return name


class _Empty(types.ModuleType):
    """A module that has a class of every name, and every module below it."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _Names(name, (), {})


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] not in _ABSENT:
            return None
        return importlib.machinery.ModuleSpec(name, self, is_package=True)

    def create_module(self, spec):
        return _Empty(spec.name)

    def exec_module(self, module):
        pass


@contextlib.contextmanager
def _absent_packages_empty():
    """Lets absent packages be imported; they are gone afterwards, since others ask whether they are installed."""
    finder = _Finder()
    sys.meta_path.append(finder)  # last: an installed one is found before
    try:
        yield
    finally:
        sys.meta_path.remove(finder)
        for name in [n for n, m in sys.modules.items() if isinstance(m, _Empty)]:
            del sys.modules[name]


def import_timm() -> Any:
    """The package timm. Skips the test where it or torch is not installed."""
    pytest.importorskip("torch")
    with _absent_packages_empty():
        return pytest.importorskip("timm")


def import_torchscale() -> Any:
    """torchscale's BEiT3 and EncoderConfig. Skips the test where torch or torchscale is not installed."""
    import_timm()
    with _absent_packages_empty(), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # torchscale imports timm by an old name
        pytest.importorskip("torchscale")
        return (
            importlib.import_module("torchscale.model.BEiT3").BEiT3,
            importlib.import_module("torchscale.architecture.config").EncoderConfig,
        )

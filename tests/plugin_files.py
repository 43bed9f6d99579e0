"""Files of components in tests: as modules, and with a registry that forgets them afterwards."""

import contextlib
import importlib.util
import pathlib
import sys
from collections.abc import Iterator
from types import ModuleType

import pytest

from dmf import registry


@contextlib.contextmanager
def registered_components() -> Iterator[None]:
    """Forgets at its end the components that were registered within."""
    components = {kind: dict(registry.components(kind)) for kind in registry.kinds()}
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(registry, "_COMPONENTS", components)
        yield


@contextlib.contextmanager
def imported(path: pathlib.Path) -> Iterator[ModuleType]:
    """A file as a module; importing it registers its components."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = sys.modules[path.stem] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    del sys.modules[path.stem]

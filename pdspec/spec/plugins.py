"""Draft families from outside the package: each is a module like a ``family.py``, in one file if it likes.

    plugins: [my_drafter.py]        a file, on every node under the same path
    plugins: [mypackage.drafter]    an importable module
    [project.entry-points."pdspec.drafters"]  NAME = "mypackage.drafter"    an installed package, without a setting

They are code and run with the rights of the process that loads them; only settings name them, never a request.
Imports no torch by itself; a plug-in may.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import sys
from collections.abc import Callable, Sequence
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar, cast

from pdspec.errors import ConfigError, PdspecError
from pdspec.spec.family import Description, Family

GROUP = "pdspec.drafters"
_PARTS = ("DESCRIPTION", "groups", "make")
_GUIDE = "see docs/adding-a-drafter.md"
T = TypeVar("T")


def outside(plugins: Sequence[str], taken: Sequence[str]) -> dict[str, Family]:
    """The families of installed packages and of ``plugins``, by name. Raises ConfigError for one that cannot be
    loaded, is no family, or has a name that is ``taken`` or another one's."""
    found: dict[str, Family] = {}
    wheres = dict.fromkeys(taken, "pdspec itself")
    for where, family in [*_installed(), *((plugin, family_of(plugin)) for plugin in dict.fromkeys(plugins))]:
        name = family.DESCRIPTION.name
        if name in wheres:
            raise _refusal(where, f"its name {name!r} is taken by {wheres[name]}", "give DESCRIPTION another name")
        wheres[name], found[name] = where, family
    return found


def family_of(plugin: str) -> Family:
    """The family in a file or module. Raises ConfigError for one that cannot be loaded or is no family."""
    return _checked(_load(plugin), plugin)


def guarded(where: str, work: Callable[[], T]) -> T:
    """What ``work`` gives. What a plug-in raises, unless it is an error for users already, becomes a ConfigError."""
    try:
        return work()
    except PdspecError:
        raise
    except Exception as error:  # code of others may raise anything, and whoever named it must learn which it was
        raise _refusal(where, f"{type(error).__name__}: {error}", "mend it, or leave it out") from error


def _installed() -> list[tuple[str, Family]]:
    places = {_place(point): point for point in entry_points(group=GROUP)}
    return [(where, _checked(guarded(where, point.load), where)) for where, point in places.items()]


def _place(point: EntryPoint) -> str:
    package = point.dist.name if point.dist else "an installed package"
    return f"{point.value} of {package}"


def _load(plugin: str) -> ModuleType:
    if not plugin.endswith(".py"):
        return guarded(plugin, lambda: importlib.import_module(plugin))
    path = Path(plugin).expanduser().absolute()
    if not path.is_file():
        raise _refusal(plugin, "there is no such file", "name a file, on every node under the same path, or a module")
    return guarded(plugin, lambda: _of_file(path))


def _of_file(path: Path) -> ModuleType:
    """The module in a file, the same one however often it is asked for."""
    name = f"pdspec_plugin_{path.stem}_{hashlib.sha256(str(path).encode()).hexdigest()[:12]}"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ImportError(f"{path} is no Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up while it runs
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def _checked(module: Any, where: str) -> Family:
    if missing := [part for part in _PARTS if not hasattr(module, part)]:
        raise _refusal(where, f"it has no {' and no '.join(missing)}", _GUIDE)
    if not isinstance(module.DESCRIPTION, Description):
        raise _refusal(where, "DESCRIPTION is no pdspec.spec.family.Description", _GUIDE)
    if not module.DESCRIPTION.name.isidentifier():
        raise _refusal(where, f"{module.DESCRIPTION.name!r} is no name", "use letters, digits and _")
    return cast(Family, module)


def _refusal(where: str, message: str, remedy: str) -> ConfigError:
    return ConfigError(f"{where}: {message}", field="plugins", remedy=remedy)

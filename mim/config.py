"""Recipes: YAML + key=value -> plain dataclasses. OmegaConf ends in this file.

A recipe is flat and complete: no includes, no interpolations, so nothing outside the file (environment, other files,
code) can leak into a run. The folder is the registry: `{name: mae, ...}` in the section `objective` is the file
`mim/objectives/mae.py`, its `Config` dataclass is the schema, and a key that the schema lacks is refused with a hint.
A dotted name, `mypackage.rotation`, is code from elsewhere: it is imported only where the command line names its
package as a plug-in, never because a recipe or a run directory says so.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import functools
import hashlib
import importlib
import importlib.util
import inspect
import json
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar, get_type_hints

from omegaconf import OmegaConf
from omegaconf.errors import ConfigKeyError, MissingMandatoryValue, OmegaConfBaseException
from yaml import YAMLError

T = TypeVar("T")

FUNCTIONS = {"mim.objectives": "build", "mim.encoders": "build", "mim.evals": "run", "mim.exports": "export"}
_plugins: ContextVar[tuple[str, ...]] = ContextVar("plugins", default=())  # packages whose code may be imported


class ConfigError(ValueError):
    """A wrong command or configuration: one sentence with the remedy. Exit code 2."""


def find_recipe(recipe: str) -> Path:
    """Return the file of a recipe given as a path or as the name of one that ships with the package."""
    path = Path(recipe)
    if path.is_file():
        return path
    folders = [folder for folder in recipe_folders() if folder.is_dir()]
    for folder in folders:
        if (folder / f"{path.name.removesuffix('.yaml')}.yaml").is_file() and path.parent == Path():
            return folder / f"{path.name.removesuffix('.yaml')}.yaml"
    known = sorted({file.stem for folder in folders for file in folder.glob("*.yaml")})
    raise ConfigError(f"no recipe {recipe!r}: it is neither a file nor one of {', '.join(known)}{_hint(recipe, known)}")


def recipe_folders() -> list[Path]:
    """Folders searched for recipe names: the installed `mim/configs`, then `configs/` of a source checkout."""
    here = Path(__file__).parent
    return [here / "configs", here.parent / "configs"]


def read(recipe: str, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Read a recipe and apply `section.key=value` overrides. Returns plain dicts, lists and scalars.

    A whole section is taken out by `section=null`; `section={}` adds nothing to it.
    """
    path = find_recipe(recipe)
    for override in overrides:
        if "=" not in override or override.startswith("-"):
            raise ConfigError(f"{override!r} is not an override; write section.key=value, e.g. optim.lr=1e-3")
    try:
        loaded = OmegaConf.load(path)
        loaded.merge_with_dotlist(list(overrides))
        plain = OmegaConf.to_container(loaded, resolve=False)
    except (OmegaConfBaseException, YAMLError, ValueError) as error:
        raise ConfigError(f"{path}: {' '.join(str(error).split())}") from error
    if not isinstance(plain, dict):
        raise ConfigError(f"{path} is not a recipe: a mapping of sections (data, encoder, objective, ...) is expected")
    _refuse_interpolation(plain, str(path))
    return {key: value for key, value in plain.items() if value is not None}  # type: ignore[misc]


def typed(schema: type[T], section: dict[str, Any], where: str = "") -> T:
    """Check a section against a dataclass and return its instance; `where` is the section's key for messages."""
    if not isinstance(section, dict):
        raise ConfigError(f"{where or 'recipe'}={section!r} must be a section of key: value lines")
    for name, hint in get_type_hints(schema).items():
        if dataclasses.is_dataclass(hint) and not isinstance(section.get(name, {}), dict):
            raise ConfigError(f"{_join(where, name)}={section[name]!r} must be a section of key: value lines")
    _refuse_interpolation(section, where or "recipe")  # again: a run directory's own config comes this way too
    try:
        return OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(schema), section))  # type: ignore[return-value]
    except ConfigKeyError as error:
        key = str(error.full_key or error.key)
        parent, _, leaf = key.rpartition(".")
        known = _fields_at(schema, parent)
        raise ConfigError(
            f"{_join(where, key)} is not a known key{_hint(leaf, known)}; known here: {', '.join(known)}"
        ) from error
    except MissingMandatoryValue as error:
        key = _join(where, str(error.full_key))
        remedy = f"set it in the recipe or as {key}=..." if "." in key else "add this section to the recipe"
        raise ConfigError(f"{key} is missing; {remedy}") from error
    except OmegaConfBaseException as error:
        key = _join(where, str(error.full_key or ""))
        raise ConfigError(f"{key or 'recipe'}: {str(error).splitlines()[0]}") from error


def known_names(package: str) -> list[str]:
    """Names of the components in a package: its files that hold a `Config`."""
    spec = importlib.util.find_spec(package)
    assert spec is not None, package
    assert spec.submodule_search_locations, package
    files = Path(spec.submodule_search_locations[0]).glob("*.py")
    return sorted(file.stem for file in files if file.stem != "__init__" and "\nclass Config" in file.read_text())


@contextlib.contextmanager
def plugins(packages: Sequence[str]) -> Iterator[None]:
    """Let components come from these packages while the block runs: what the command line says with `--plugin`."""
    token = _plugins.set(tuple(packages))
    try:
        yield
    finally:
        _plugins.reset(token)


def component(package: str, section: dict[str, Any] | None, where: str) -> tuple[ModuleType, Any]:
    """Resolve `{name: NAME, ...}` to the module `package.NAME` and an instance of its `Config`."""
    known = known_names(package)
    if not isinstance(section, dict) or "name" not in section:
        raise ConfigError(f"{where}.name is missing; choose one of {', '.join(known)}")
    name = section["name"]
    if name in known:
        module = importlib.import_module(f"{package}.{name}")
    elif "." in str(name) and package in FUNCTIONS:
        module = _plugin(package, name, where)
    else:
        raise ConfigError(
            f"{where}.name={name!r} is unknown{_hint(str(name), known)}; choose one of {', '.join(known)}"
        )
    return module, typed(module.Config, {k: v for k, v in section.items() if k != "name"}, where)


def _plugin(package: str, name: str, where: str) -> ModuleType:
    """Import a component from elsewhere, if the command line allows its package, and check that it is one."""
    root = name.partition(".")[0]
    if not any(name == allowed or name.startswith(f"{allowed}.") for allowed in _plugins.get()):
        raise ConfigError(
            f"{where}.name={name!r} is code of the package {root}, which runs only if the command names it: "
            f"add --plugin {root} if you trust it"
        )
    try:
        module = importlib.import_module(name)
    except ModuleNotFoundError as error:
        if not f"{name}.".startswith(f"{error.name}."):  # the plug-in itself lacks something
            raise
        raise ConfigError(
            f"{where}.name={name!r} cannot be imported ({error}); install the package {root}, or put its folder on "
            f"PYTHONPATH"
        ) from error
    function = FUNCTIONS[package]
    if not dataclasses.is_dataclass(getattr(module, "Config", None)):
        raise ConfigError(f"{where}.name={name!r} is no plug-in: {module.__file__} has no dataclass Config")
    if not callable(getattr(module, function, None)):
        raise ConfigError(f"{where}.name={name!r} is no plug-in: {module.__file__} has no function {function}")
    return module


def bind(module: str, section: dict[str, Any], where: str) -> Callable[..., Any]:
    """Resolve `{name: NAME, option: value}` to the function NAME of a module with its keyword-only options bound."""
    imported = importlib.import_module(module)
    functions = {
        name: function
        for name, function in vars(imported).items()
        if inspect.isfunction(function) and function.__module__ == module and not name.startswith("_")
    }
    selectable = {n: f for n, f in functions.items() if _keyword_options(f)}
    if not isinstance(section, dict) or section.get("name") not in list(selectable):
        given = section.get("name") if isinstance(section, dict) else section
        raise ConfigError(
            f"{where}.name={given!r} is unknown{_hint(str(given), list(selectable))}; "
            f"choose one of {', '.join(sorted(selectable))}"
        )
    function = selectable[section["name"]]
    fields = [(p.name, hint, dataclasses.field(default=p.default)) for p, hint in _keyword_options(function)]
    given = {key: value for key, value in section.items() if key != "name"}
    checked: Any = typed(dataclasses.make_dataclass(function.__name__, fields), given, where)
    return functools.partial(function, **{key: getattr(checked, key) for key in given})


def plain(value: Any) -> Any:
    """Dataclasses, tuples and paths as what JSON and YAML hold."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, dict):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(v) for v in value]
    return str(value) if isinstance(value, Path) else value


def digest(value: Any) -> str:
    """Hash of plain data, independent of key order."""
    return hashlib.sha256(json.dumps(plain(value), sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def difference(old: Any, new: Any, where: str = "") -> list[str]:
    """Return the lines `key: old -> new` in which two plain values differ."""
    if isinstance(old, dict) and isinstance(new, dict):
        keys = sorted(set(old) | set(new))
        return [line for k in keys for line in difference(old.get(k), new.get(k), _join(where, k))]
    return [] if old == new else [f"{where}: {old!r} -> {new!r}"]


def to_yaml(value: Any) -> str:
    """Plain data as YAML text."""
    return OmegaConf.to_yaml(OmegaConf.create(plain(value)))


def from_yaml(path: Path) -> dict[str, Any]:
    """Read back what `to_yaml` wrote."""
    return OmegaConf.to_container(OmegaConf.load(path), resolve=False)  # type: ignore[return-value]


def _keyword_options(function: Callable[..., Any]) -> list[tuple[inspect.Parameter, Any]]:
    hints = get_type_hints(function)
    parameters = inspect.signature(function).parameters.values()
    return [(p, hints[p.name]) for p in parameters if p.kind is p.KEYWORD_ONLY]


def _fields_at(schema: Any, parent: str) -> list[str]:
    """Field names of the dataclass found by following a dotted path of fields from `schema`."""
    for part in filter(None, parent.split(".")):
        schema = get_type_hints(schema).get(part)
    return [f.name for f in dataclasses.fields(schema)] if dataclasses.is_dataclass(schema) else []


def _refuse_interpolation(value: Any, where: str) -> None:
    if isinstance(value, dict):
        for key, item in value.items():
            _refuse_interpolation(item, f"{where}: {key}" if ": " not in where else f"{where}.{key}")
    elif isinstance(value, list):
        for item in value:
            _refuse_interpolation(item, where)
    elif isinstance(value, str) and "${" in value:
        raise ConfigError(f"{where}={value!r} holds an interpolation; recipes are flat: write the value itself")


def _hint(word: str, known: Sequence[str]) -> str:
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.6)
    return f"; did you mean {close[0]!r}?" if close else ""


def _join(where: str, key: str) -> str:
    return f"{where}.{key}" if where and key else where or key

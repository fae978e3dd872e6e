"""The registry of methods: built-in ones register where they are defined, third parties through an entry point.

A package of yours adds a method with two lines in its pyproject.toml and nothing here:

    [project.entry-points."tomoe_bench.methods"]
    my-method = "my_package.my_module:MyMethod"
"""

import dataclasses
from collections.abc import Callable, Mapping
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

from methods.base import Method
from methods.errors import UserError, unknown

GROUP = "tomoe_bench.methods"
FAMILIES = ("dense", "depth", "width", "semi-structured", "moe")
_METHODS: dict[str, type[Method]] = {}
M = TypeVar("M", bound=type[Method])
Configured = TypeVar("Configured")
Presets = Mapping[str, Mapping[str, Any]]
PRESET = "preset"
"""What `--set METHOD.preset=NAME` writes in place of a field."""


def register(name: str, *, title: str, reference: str, family: str) -> Callable[[M], M]:
    """Class decorator: make a `Method` known under `name`."""

    def decorate(method: M) -> M:
        parameters = vars(method).get("__dataclass_params__")
        if not (issubclass(method, Method) and parameters and parameters.frozen):
            raise TypeError(f"{method.__qualname__} must be a Method and a frozen dataclass to be registered")
        if family not in FAMILIES:
            raise ValueError(f"family {family!r} of {name} must be one of {', '.join(FAMILIES)}")
        if name in _METHODS:
            raise ValueError(f"a method named {name!r} is registered already: {_METHODS[name].__qualname__}")
        method.name, method.title, method.reference, method.family = name, title, reference, family  # type: ignore[assignment]
        _METHODS[name] = method
        return method

    return decorate


@cache
def _third_party() -> dict[str, EntryPoint]:
    return {entry.name: entry for entry in entry_points(group=GROUP)}


def names() -> list[str]:
    """Every registered name: built-in ones by family, dense first, then the others."""
    built_in = sorted(_METHODS, key=lambda name: (FAMILIES.index(_METHODS[name].family), name))
    return [*built_in, *(name for name in _third_party() if name not in _METHODS)]


def get(name: str) -> type[Method]:
    """The method class of a name.

    Raises:
        UserError: no such method (the message suggests near misses), or its package does not import.
    """
    if name in _METHODS:
        return _METHODS[name]
    if name not in _third_party():
        raise unknown("method", name, names(), "List them with: python run_all.py --list methods")
    entry = _third_party()[name]
    try:
        method = entry.load()
    except Exception as error:
        raise UserError(
            f"the method {name!r} comes from the installed package entry {entry.value!r}, which does not import: "
            f"{type(error).__name__}: {error}. Mend or uninstall that package, or leave {name} out of --methods."
        ) from error
    if _METHODS.get(name) is not method:
        raise UserError(f"the entry point {entry.value!r} must be a class decorated with @register({name!r}, ...).")
    return method


def configure(name: str, settings: Mapping[str, str]) -> Method:
    """An instance of a method with some fields set from text, as `--set METHOD.FIELD=VALUE` gives them.

    `--set METHOD.preset=NAME` starts from the values of a preset.

    Raises:
        UserError: unknown method or field, or a value that the field cannot take.
    """
    method = get(name)
    configured = from_text(method, method.presets, name, settings)
    configured.check([field for field in settings if field != PRESET])
    return configured


def from_text(kind: type[Configured], presets: Presets, name: str, settings: Mapping[str, str]) -> Configured:
    """An instance of a dataclass with some fields set from text, one of `presets` before the others.

    Args:
        name: what `--set` calls it.

    Raises:
        UserError: an unknown field or preset, or a value that the field cannot take.
    """
    fields = [field.name for field in dataclasses.fields(kind)]  # type: ignore[arg-type]
    types = get_type_hints(kind)
    values = _preset(presets, name, settings)
    for field, text in settings.items():
        if field == PRESET:
            continue
        if field not in fields:
            raise unknown(f"field of {name}", field, fields, f"Use --set {name}.FIELD=VALUE.")
        values[field] = _parse(f"{name}.{field}", text, types[field])
    return kind(**values)


def _preset(presets: Presets, name: str, settings: Mapping[str, str]) -> dict[str, Any]:
    """The values of the preset that the settings name, to which the others are changes."""
    known = {"default": {}, **presets}
    wanted = settings.get(PRESET, "default")
    if wanted not in known:
        raise unknown(f"preset of {name}", wanted, known)
    return dict(known[wanted])


def _parse(where: str, text: str, kind: Any) -> Any:
    """`text` as a value of the field's type: number, text, truth value, one of some texts, or none if it may be."""
    if type(None) in get_args(kind):
        (kind,) = (member for member in get_args(kind) if member is not type(None))
        if text == "none":
            return None
    choices = get_args(kind) if get_origin(kind) is Literal else ("true", "false") if kind is bool else ()
    if choices:
        if text not in choices:
            raise unknown(f"value for --set {where}", text, choices)
        return text == "true" if kind is bool else text
    try:
        return kind(text)
    except ValueError:
        raise UserError(f"--set {where}={text}: the value must be of type {kind.__name__}.") from None

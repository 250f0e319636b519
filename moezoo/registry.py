"""Named components: registered by decorator or entry point, built from a spec, options checked by
signature.

A component's options are the keyword arguments of its `__init__`, written once. Unknown or mistyped
options are refused before anything is built, with the nearest known name.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import os
import re
import sys
import threading
import types
import typing
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.machinery import PathFinder
from typing import Any, Generic, TypeVar

from moezoo.errors import ConfigError, RegistryError, did_you_mean

T = TypeVar("T")
_NAME = re.compile(r"[a-z][a-z0-9_]*\Z")


@dataclass(frozen=True)
class Spec:
    """A component's name and options; round-trips through JSON as `{"name": ..., **options}`."""

    name: str
    options: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def parse(
        cls, value: object, *, kind: str = "component", unnamed: Sequence[str] | None = None
    ) -> Spec:
        """A spec from a name, `name:value`, `name:option=value,...`, a mapping with `name`, or a
        spec. Raises ConfigError.

        Args:
            unnamed: options whose values may stand without a name, in order; None: `k` of routers,
                `factor` of capacity policies.
        """
        if isinstance(value, Spec):
            return value
        if isinstance(value, str):
            return _from_text(value, kind, _unnamed(kind) if unnamed is None else unnamed)
        if isinstance(value, Mapping):
            options = dict(value)
            name = options.pop("name", None)
            if not isinstance(name, str):
                raise ConfigError(
                    f"a {kind} given as a mapping needs a 'name'", field=kind, found=dict(value)
                )
            return cls(name, options)
        raise ConfigError(
            f"a {kind} is a name, a mapping with 'name', or an instance",
            field=kind,
            found=type(value).__name__ if meant(kind, value) is None else value,
            hint=meant(kind, value),
        )

    def to_json(self) -> str | dict[str, Any]:
        """The shortest JSON value that parses back to this spec."""
        return {"name": self.name, **self.options} if self.options else self.name


# What people write as a bare number: a capacity factor, or the choices per token.
_NUMBERS = {"capacity": ("switch", "factor"), "router": ("top_k", "k")}


def _unnamed(kind: str) -> Sequence[str]:
    found = _NUMBERS.get(kind.split()[0])
    return () if found is None else found[1:]


def _from_text(text: str, kind: str, options: Sequence[str]) -> Spec:
    name, colon, rest = text.partition(":")
    chosen: dict[str, Any] = {}
    for position, part in enumerate(rest.split(",") if colon else ()):
        option, equals, value = part.partition("=")
        if not equals:
            if position >= len(options):
                raise ConfigError(
                    f"{kind} {name!r} takes {len(options)} options without a name", field=kind,
                    found=rest[:80], hint="Say name:option=value.",
                )  # fmt: skip
            option, value = options[position], part
        chosen[option.strip()] = _value(value.strip())
    return Spec(name, chosen)


def _value(text: str) -> int | float | str:
    if re.fullmatch(r"[+-]?\d{1,18}", text):
        return int(text)
    try:
        return float(text)
    except ValueError:
        return text


def meant(kind: str, value: object) -> str | None:
    """A hint for a number where a component is wanted, as JSON and as Python; else None."""
    try:
        number = float(str(value))
    except ValueError:
        return None
    if kind.split()[0] not in _NUMBERS:
        return None
    name, option = _NUMBERS[kind.split()[0]]
    shown = int(number) if number.is_integer() else number
    return f'Did you mean {{"name": "{name}", "{option}": {shown}}}?'


class Registry(Generic[T]):
    """Components of one kind, by name.

    Args:
        kind: what a component is called in messages, such as "router".
        base: the class that every component extends.
        group: the entry-point group in which other packages announce theirs.
    """

    def __init__(self, kind: str, base: type[T], group: str) -> None:
        self.kind = kind
        self.base = base
        self.group = group
        self._components: dict[str, type[T]] = {}
        self._lock = threading.RLock()
        self._plugins_loaded = False

    def register(self, name: str, *, override: bool = False) -> Callable[[type[T]], type[T]]:
        """Class decorator: make a component buildable by `name`.

        Raises RegistryError for a bad or taken name, ConfigError for a class of another kind.
        """
        if not isinstance(name, str) or not _NAME.match(name):
            raise RegistryError(
                f"{name!r} is no name for a {self.kind}", hint="Use snake_case, such as 'top_k'."
            )

        def add(component: type[T]) -> type[T]:
            self._check_component(name, component)
            with self._lock:
                if name in self._components and not override:
                    taken = self._components[name].__qualname__
                    raise RegistryError(
                        f"{self.kind} {name!r} is registered already, by {taken}",
                        hint="Choose another name or pass override=True.",
                    )
                self._components[name] = component
            return component

        return add

    def names(self) -> list[str]:
        """All registered names, sorted."""
        self._load_plugins()
        return sorted(self._components)

    def get(self, name: str) -> type[T]:
        """The class registered under `name`. Raises RegistryError naming the nearest."""
        self._load_plugins()
        if not isinstance(name, str) or name not in self._components:
            hint = meant(self.kind, name) or did_you_mean(name, self._components)
            raise RegistryError(f"unknown {self.kind} {name!r}", hint=hint)
        return self._components[name]

    def build(self, spec: object, **sizes: Any) -> T:
        """Build a component from a name, a mapping with `name`, a Spec, or pass an instance
        through.

        `sizes` (d_model, num_experts, ...) reach the constructor as far as its signature names
        them. Raises RegistryError for an unknown name, ConfigError for an unknown, mistyped or
        missing option.
        """
        if isinstance(spec, self.base):
            return spec
        parsed = Spec.parse(spec, kind=self.kind)
        component = self.get(parsed.name)
        known = _options(component)  # type: ignore[arg-type]  # classes are hashable
        self.check_options(parsed)
        arguments = {key: value for key, value in sizes.items() if key in known} | dict(
            parsed.options
        )
        for key, parameter in known.items():
            if parameter.default is parameter.empty and key not in arguments:
                raise ConfigError(
                    f"{self.kind} {parsed.name!r} needs {key!r}", field=key, hint=f"Pass {key}=..."
                )
        return component(**arguments)

    def takes(self, name: str, option: str) -> bool:
        """Whether the component of that name has an option. Raises RegistryError."""
        return option in _options(self.get(name))  # type: ignore[arg-type]  # classes are hashable

    def check_options(self, spec: Spec) -> None:
        """Refuse options that the component's constructor does not take. Raises ConfigError."""
        component = self.get(spec.name)
        known = _options(component)  # type: ignore[arg-type]  # classes are hashable
        hints = typing.get_type_hints(component.__init__)
        for key, value in spec.options.items():
            if key not in known:
                raise ConfigError(
                    f"{self.kind} {spec.name!r} has no option {key!r}",
                    field=key,
                    hint=did_you_mean(key, known),
                )
            if key in hints and not _matches(value, hints[key]):
                raise ConfigError(
                    f"option {key!r} of {self.kind} {spec.name!r} has the wrong type",
                    field=key,
                    expected=_described(hints[key]),
                    found=repr(value),
                )

    def _check_component(self, name: str, component: object) -> None:
        if isinstance(component, type) and issubclass(component, self.base):
            return
        wanted = self.base.__name__
        lacks = [m for m in ("forward",) if not callable(getattr(component, m, None))]
        because = f": it has no method {lacks[0]!r}" if lacks else ""
        label = getattr(component, "__qualname__", repr(component))
        raise ConfigError(
            f"{label} cannot be registered as {self.kind} {name!r}{because}",
            hint=f"Extend {wanted}.",
        )

    def _load_plugins(self) -> None:
        with self._lock:
            if self._plugins_loaded:
                return
            self._plugins_loaded = True
            if not _may_be_announced(self.group):
                return
            from importlib.metadata import entry_points

            for point in entry_points(group=self.group):
                self._load_plugin(point)

    def _load_plugin(self, point: Any) -> None:
        # A plugin is foreign code: whatever it raises is its fault alone, and the rest must keep
        # working.
        try:
            component = point.load()
            if point.name not in self._components:
                self.register(point.name)(component)
        except Exception as error:  # noqa: BLE001
            plugin = f"plugin {point.name!r} ({point.value}, group {self.group})"
            reason = f"{type(error).__name__}: {error}"
            warnings.warn(f"{plugin} was not loaded: {reason}", stacklevel=4)


def _may_be_announced(group: str) -> bool:
    """Whether some distribution announces entry points in the group; True when in doubt.

    Hardly anybody has a plugin, and importlib.metadata takes longer to import than all that
    converting a checkpoint needs of this package.
    """
    if any(hasattr(f, "find_distributions") and f is not PathFinder for f in sys.meta_path):
        return True
    for place in sys.path:
        try:
            names = os.listdir(place or ".")
        except FileNotFoundError:
            continue
        except OSError:
            return True  # a zip file, or one that must not be listed but may be read
        for name in names:
            if name.lower().endswith((".dist-info", ".egg-info", "egg-info")):
                with (
                    contextlib.suppress(OSError),
                    open(os.path.join(place, name, "entry_points.txt"), "rb") as file,
                ):
                    if f"[{group}]".encode() in file.read():
                        return True
    return False


@functools.cache  # components are few, and are built by name in every read of a config
def _options(component: type) -> dict[str, inspect.Parameter]:
    """The constructor's named parameters; `*args, **kwargs` inherited from a base are not
    options.
    """
    if component.__init__ is object.__init__:  # type: ignore[misc]
        return {}  # what inspect would find out, by parsing a text
    variadic = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    parameters = inspect.signature(component).parameters
    return {name: p for name, p in parameters.items() if p.kind not in variadic}


def _described(hint: object) -> str:
    """An annotation in a reader's words: the allowed words of a Literal, or the type's name."""
    if typing.get_origin(hint) is typing.Literal:
        return " or ".join(repr(word) for word in typing.get_args(hint))
    return hint.__name__ if isinstance(hint, type) else str(hint)


def _matches(value: object, hint: object) -> bool:
    """Whether a JSON-like value fits a plain annotation; annotations that are not plain always
    fit.
    """
    origin = typing.get_origin(hint)
    if origin in (typing.Union, types.UnionType):
        return any(_matches(value, option) for option in typing.get_args(hint))
    if origin is typing.Literal:
        return value in typing.get_args(hint)
    if hint is type(None):
        return value is None
    if hint is bool:
        return isinstance(value, bool)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if hint is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    if hint is str:
        return isinstance(value, str)
    return True

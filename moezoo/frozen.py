"""Plain JSON values that cannot change: what a frozen config holds. Imports no torch."""

from __future__ import annotations

from typing import Any, NoReturn


class FrozenDict(dict[str, Any]):
    """A dict that is what it was made as: equal to a plain one, written as JSON like one, and
    hashable as long as its values are.
    """

    def __hash__(self) -> int:  # type: ignore[override]  # a dict has none because it can change
        return hash(frozenset(self.items()))

    def __reduce__(self) -> tuple[type[FrozenDict], tuple[dict[str, Any]]]:
        return FrozenDict, (dict(self),)  # a dict is copied and unpickled by setting its items

    def _refuse(self, *_: object, **__: object) -> NoReturn:
        raise TypeError("the options of a config cannot be changed; config.replace(...) makes new")

    __setitem__ = __delitem__ = __ior__ = _refuse
    clear = pop = popitem = setdefault = update = _refuse


def frozen(value: Any) -> Any:
    """A copy of plain values with dicts as `FrozenDict` and lists as tuples, however deep."""
    if isinstance(value, dict):
        return FrozenDict({key: frozen(item) for key, item in value.items()})
    return tuple(map(frozen, value)) if isinstance(value, (list, tuple)) else value


def thawed(value: Any) -> Any:
    """The inverse: plain dicts and lists."""
    if isinstance(value, dict):
        return {key: thawed(item) for key, item in value.items()}
    return [thawed(item) for item in value] if isinstance(value, (list, tuple)) else value

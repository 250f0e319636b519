"""Every error that moezoo raises on purpose: one line that names the culprit and the way out.

Each class is also the built-in error that a caller would expect (`ValueError`, `LookupError`,
`OSError`, ...), so code that does not know moezoo catches it too. The command line maps the
families to exit codes (`exit_code`).
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class MoezooError(Exception):
    """Base of every error raised on purpose.

    Args:
        message: what is wrong and where (file, key, field, layer).
        field: the option or config field at fault.
        path: the file or directory at fault.
        key: the tensor or JSON key at fault.
        expected, found: what was required and what was there; both are shown when given.
        hint: what to do next.
    """

    exit_code = 3

    def __init__(
        self,
        message: str,
        *,
        field: str | None = None,
        path: object = None,
        key: str | None = None,
        expected: object = None,
        found: object = None,
        hint: str | None = None,
    ) -> None:
        self.message = message
        self.field = field
        self.path = None if path is None else str(path)
        self.key = key
        self.expected = expected
        self.found = found
        self.hint = hint
        super().__init__(str(self))

    def __str__(self) -> str:
        text = self.message
        if self.path is not None and self.path not in text:
            text = f"{self.path}: {text}"
        if self.expected is not None:
            text += f"; expected {self.expected}"
        if self.found is not None:
            text += (
                f", found {self.found}" if self.expected is not None else f"; found {self.found}"
            )
        if self.hint:
            text += f". {self.hint}"
        # A path or a key may hold a newline; one error stays one line.
        return text.replace("\r", "\\r").replace("\n", "\\n")


class ConfigError(MoezooError, ValueError):
    """An option or config field is unknown, mistyped, out of range or contradicts another."""

    exit_code = 2


class MissingExtra(ConfigError, ImportError):
    """A package is needed that moezoo does not ask for by itself.

    Args:
        purpose: what needs it. package: its name. extra: of moezoo, which brings it.
    """

    def __init__(self, purpose: str, package: str, *, extra: str) -> None:
        super().__init__(f"{purpose} needs {package}, which is missing", hint=how_to_install(extra))

    def __str__(self) -> str:  # as ImportError it would be the message alone
        return MoezooError.__str__(self)


def how_to_install(extra: str) -> str:
    """What brings the packages of an extra; moezoo itself stands on no index yet."""
    return f"In the folder of moezoo's sources: pip install '.[{extra}]'"


class RegistryError(MoezooError, LookupError):
    """A name is not registered, or is registered already."""

    exit_code = 2

    def __str__(self) -> str:  # LookupError's KeyError-like repr is never wanted
        return MoezooError.__str__(self)


class CheckpointError(MoezooError, OSError):
    """A checkpoint on disk cannot be used as it is."""

    def __str__(self) -> str:
        return MoezooError.__str__(self)


class CorruptFile(CheckpointError):
    """A file is truncated, malformed or not what its name says."""


class IndexFileError(CheckpointError):
    """A shard index is malformed, names unsafe paths or disagrees with its shards."""


class TensorMismatch(CheckpointError):
    """A tensor is missing, unexpected, or has the wrong shape or dtype."""


class NonFiniteWeights(CheckpointError):
    """A weight is NaN or infinite."""


class UnsafeCheckpoint(CheckpointError):
    """A checkpoint asks for code to be run; it never is."""


class SaveError(CheckpointError):
    """Writing failed; whatever was at the target before is still there."""

    exit_code = 4


class TargetExists(SaveError):
    """The target of a save exists already."""


class TokenizerError(MoezooError, ValueError):
    """A tokenizer file is missing, corrupt or of the wrong vocabulary."""


class RoutingError(MoezooError, ValueError):
    """A routing record breaks one of its invariants, or a layer got input that it cannot route."""


class ShapeError(RoutingError):
    """A tensor has the wrong rank or size."""


class DtypeError(RoutingError, TypeError):
    """A tensor has a dtype that cannot be routed."""


class NonFiniteInput(RoutingError):
    """An input holds NaN or infinity (raised in checked mode only)."""


class TrainingError(MoezooError, RuntimeError):
    """A training run cannot go on."""


class NonFiniteLoss(TrainingError):
    """The loss or a gradient is NaN or infinite."""


class ResumeMismatch(TrainingError):
    """A run is resumed with other settings than it was saved with."""


class RankLost(TrainingError):
    """A process of a distributed run was killed, stopped, cut off, or left with an error."""

    exit_code = 5


class RanksDiffer(TrainingError):
    """The processes of a distributed run were started with different settings, data or weights."""


def nearest(name: object, known: Iterable[str]) -> str | None:
    """The known name closest to `name`, or None when nothing is close."""
    matches = difflib.get_close_matches(str(name).lower(), list(known), n=1, cutoff=0.6)
    return matches[0] if matches else None


def did_you_mean(name: object, known: Iterable[str]) -> str:
    """A hint for an unknown name: the nearest one, or all of them when nothing is near."""
    names = sorted(known)
    match = nearest(name, names)
    return f"Did you mean {match!r}?" if match else f"Known: {', '.join(names) or '(none)'}."

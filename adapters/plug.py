"""Replacing MLPs of a live model, whatever library it comes from."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Callable
from dataclasses import dataclass, replace

from torch import nn

from moezoo.adapters.causality import check_plugged
from moezoo.adapters.padding import Mask, carriers_of
from moezoo.adapters.sparse import Sparse
from moezoo.errors import ConfigError, did_you_mean
from moezoo.functional.shards import refuse_sharded, unwrapped
from moezoo.layer import MoE
from moezoo.private_torch import is_made_by_compile

_PLUGS = "_moezoo_plugs"
Where = str | re.Pattern[str] | type[nn.Module] | Callable[[str, nn.Module], bool]


def plug(
    model: nn.Module,
    where: Where,
    make: Callable[[nn.Module], nn.Module],
    *,
    mask: Mask = None,
    causal: bool | None = None,
) -> list[str]:
    """Replace modules of a live model; all of them, or on any error none.

    Args:
        model: any module; changed in place.
        where: a shell pattern on module names ("encoder.layers.*.mlp"), a compiled regular
            expression that matches the whole name, a module class, or `(name, module) -> bool`.
            A module inside a replaced one is left alone.
        make: gives the replacement of a module; see `moezoo.adapters.sparse.sparse` for one that
            copies the dense weights into experts.
        mask: which tokens are real: the name of an argument of the model, or a function of its
            arguments by name that gives (B, L) bool; None: an argument whose name says it, such as
            `attention_mask` or `src_key_padding_mask`; False: all are.
        causal: True: a decoder, where routers that let a token see later ones are refused; False:
            tokens may see each other; None: what the model's attention says of itself.

    Returns:
        The names of the replaced modules. A module that stands in two places is made once.

    Raises ConfigError when nothing matches, when `make` does not return a module, when other
    modules hold its weights, and when mask or causal cannot be told.
    """
    if isinstance(make, nn.Module):
        hint = "Pass lambda old: moezoo.SparseMLP(...), or moezoo.adapters.sparse.sparse(8)."
        reason = "make gives the replacement of a module; one module cannot stand in many places"
        raise ConfigError(reason, field="make", found=type(make).__name__, hint=hint)
    refuse_sharded(model, "plugging")
    _refuse_ddp(model)
    chosen = _chosen(model, where)
    made: dict[int, nn.Module] = {}
    for name, module in chosen:
        if id(module) in made:
            continue
        new = make(module)
        if not isinstance(new, nn.Module):
            found = type(new).__name__
            reason = f"make({name!r}) did not return a module"
            hint = "Such as moezoo.adapters.sparse.sparse(8), with its number of experts."
            raise ConfigError(reason, field="make", found=found, hint=hint)
        check_plugged(model, name, new, causal)
        new.train(module.training)
        made[id(module)] = new
    for name, module in chosen:
        _refuse_tied(model, name, module, made[id(module)])
    names = [name for name, _ in chosen]
    carriers = carriers_of(model, names, mask)
    for name, module in chosen:
        parent, _, attribute = name.rpartition(".")
        setattr(model.get_submodule(parent), attribute, made[id(module)])
    for owner, carrier in carriers.items():
        carrier.attach(model, owner)
    _leave_nested_tensors(model, names)
    said = make if isinstance(make, Sparse) else type(make).__name__
    holder, prefix = inside_of(model)
    own = [name.removeprefix(prefix) for name in names]
    before = [replace(done, names=_outside(own, done.names)) for done in plugs_of(holder)]
    vars(holder)[_PLUGS] = (*filter(_names_any, before), Plug(own, said, mask, causal))
    return names


@dataclass(frozen=True)
class Plug:
    """One call of `plug`: the names that it replaced, and its arguments; of a `make` of your own
    its kind alone, for a function may keep a model from being pickled.
    """

    names: list[str]
    make: Sparse | str
    mask: Mask
    causal: bool | None


def inside_of(model: nn.Module) -> tuple[nn.Module, str]:
    """The model that `torch.compile` and DataParallel hold, and what its names begin with there."""
    prefix, found = "", model
    while is_made_by_compile(found) or isinstance(found, nn.DataParallel):
        name = "module" if isinstance(found, nn.DataParallel) else "_orig_mod"
        prefix, found = f"{prefix}{name}.", getattr(found, name)
    return found, prefix


def _refuse_ddp(model: nn.Module) -> None:
    if unwrapped(model) is not model:
        hint = "Plug before DistributedDataParallel, and make the optimizer then."
        reason = "the gradients of new weights would differ between ranks"
        raise ConfigError(reason, field="model", hint=hint)


def plugs_of(model: nn.Module) -> tuple[Plug, ...]:
    """The calls of `plug` that a model has seen, in order, with what is still there of them: a
    module that was put back in the place of experts is not.
    """
    found: tuple[Plug, ...] = vars(model).get(_PLUGS, ())
    modules = model.named_modules(remove_duplicate=False)
    sparse = [f"{name}." for name, module in modules if isinstance(module, MoE)]
    kept = [
        replace(done, names=[n for n in done.names if any(s.startswith(f"{n}.") for s in sparse)])
        if isinstance(done.make, Sparse)
        else done
        for done in found
    ]
    return tuple(filter(_names_any, kept))


def _outside(names: list[str], earlier: list[str]) -> list[str]:
    """Those of the names of earlier plugs that nothing was put into the place of."""
    return [n for n in earlier if not any(f"{n}.".startswith(f"{now}.") for now in names)]


def _names_any(done: Plug) -> bool:
    return bool(done.names)


def _refuse_tied(model: nn.Module, name: str, old: nn.Module, new: nn.Module) -> None:
    """Raise ConfigError for a weight of a module that others hold, too, and that it would lose."""
    kept, inside = {id(p) for p in new.parameters()}, set(old.modules())
    lost = {id(p): found for found, p in old.named_parameters() if id(p) not in kept}
    others = (
        p for part in model.modules() if part not in inside for p in part.parameters(recurse=False)
    )
    tied = next((lost[id(p)] for p in others if id(p) in lost), None)
    if tied is not None:
        hint = "Untie it first, or let the modules be one, which is then replaced as one."
        reason = f"{tied!r} of {name!r} is also a weight of other modules: copies would part them"
        raise ConfigError(reason, field="where", hint=hint)


def _leave_nested_tensors(model: nn.Module, names: list[str]) -> None:
    """torch's encoder packs a padded batch for layers whose weights it reads; ours it must call."""
    for name, module in model.named_modules():
        inside = any(layer.startswith(f"{name}." if name else "") for layer in names)
        if inside and isinstance(module, nn.TransformerEncoder):
            module.use_nested_tensor = False


def _chosen(model: nn.Module, where: Where) -> list[tuple[str, nn.Module]]:
    matches = _matcher(where)
    chosen: list[tuple[str, nn.Module]] = []
    names = []
    for name, module in model.named_modules(remove_duplicate=False):
        inside = any(name.startswith(f"{outer}.") for outer, _ in chosen)
        names += [name] if name else []
        if name and not inside and matches(name, module):
            chosen.append((name, module))
    if not chosen:
        hint = did_you_mean(where, names) if isinstance(where, str) else "No module fits."
        raise ConfigError(
            f"nothing to replace: {where!r} matches no module", field="where", hint=hint
        )
    return chosen


def _matcher(where: Where) -> Callable[[str, nn.Module], bool]:
    if isinstance(where, str):
        return lambda name, module: fnmatch.fnmatchcase(name, where)
    if isinstance(where, re.Pattern):
        return lambda name, module: where.fullmatch(name) is not None
    if isinstance(where, type) and issubclass(where, nn.Module):
        return lambda name, module: isinstance(module, where)
    if callable(where) and not isinstance(where, type):
        return where
    wanted = "a pattern, a compiled expression, a module class or a predicate"
    raise ConfigError("cannot search with this", field="where", expected=wanted, found=repr(where))

"""Life cycle of an adapter on a model: added or loaded, activated, frozen or trained, deleted."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path

from torch import nn

from veneer.adapters.merging import require_known
from veneer.adapters.training import let_gradients_through_checkpoints, require_something_to_train
from veneer.contract import MethodConfig
from veneer.errors import AdapterNameError, CompositionError, ConfigError
from veneer.model.adapted.allocation import Allocation
from veneer.model.adapted.copies import saved_paths
from veneer.model.adapted.site import own_tensors
from veneer.model.adapted.state import AdapterState
from veneer.model.adapted.token_rows import require_rows_agree
from veneer.model.attach.attach import adapted_layers, adapted_modules, adapted_places, attach, check_name, detach
from veneer.store.adapter.tensors import Leniency, holds_network, load_weights


@dataclass(frozen=True)
class Loading:
    """Options for loading a saved adapter onto a model.

    ``is_trainable``: the adapter trains. ``widen``: it is float32 on a 16-bit base. ``leniency``: tolerated
    differences.
    """

    is_trainable: bool
    widen: bool
    config: MethodConfig
    leniency: Leniency = field(default_factory=Leniency)


def noted(config: MethodConfig, revision: str | None) -> MethodConfig:
    """Return the config with the base model's revision, if one is given."""
    return config if revision is None else replace(config, revision=revision)


def prepare(model: nn.Module, state: AdapterState) -> None:
    """Freeze a plain model, and install a check at each training step that some parameter trains."""
    model.requires_grad_(False)
    state.watch = model.register_forward_pre_hook(require_something_to_train, with_kwargs=True)
    let_gradients_through_checkpoints(model)


def add(model: nn.Module, state: AdapterState, name: str, config: MethodConfig, allocation: Allocation) -> None:
    """Attach a new adapter. It trains whenever it is active, unless its config sets ``inference_mode``."""
    require_unmerged(state, f"add {name!r}")
    attach(model, config, name, state, allocation=allocation)
    _attached(model, state, name, not config.inference_mode)


def load(model: nn.Module, state: AdapterState, folder: Path, name: str, options: Loading) -> list[str]:
    """Attach a saved adapter, or load the values into an attached adapter of the same name.

    Returns the keys of parameters that keep their initial values (see `Leniency`). An attached adapter stays trainable
    if it was. Raises ConfigError if the settings of the attached adapter differ from those in the files.
    """
    require_unmerged(state, f"load {name!r}")
    if name in state.configs:
        _require_same_settings(model, state.configs[name].packed(), options.config, name)
        left = load_weights(model, state, name, folder, options.leniency)
        if options.is_trainable:
            make_trainable(model, state, (name,), True)
        return left
    config = attached_as(options.config, folder, options.is_trainable)
    attach(model, config, name, state, allocation=Allocation(values=options.leniency.mismatched, widen=options.widen))
    try:
        left = load_weights(model, state, name, folder, options.leniency)
    except BaseException:
        detach(model, state, name)
        raise
    _attached(model, state, name, options.is_trainable)
    if not options.is_trainable:
        model.eval()  # as PEFT does: a frozen adapter is there to be used, without dropout
    return left


def attached_as(config: MethodConfig, folder: Path, is_trainable: bool) -> MethodConfig:
    """Return the config with which a saved adapter is attached.

    If a network computed the adapter's virtual tokens and is not on disk, the tokens themselves are trained from now
    on. The config then keeps ``inference_mode``.
    """
    config = replace(config, inference_mode=not is_trainable)
    lost = config.has_network and not holds_network(folder)
    return replace(config, inference_mode=True) if lost else config


def _attached(model: nn.Module, state: AdapterState, name: str, trainable: bool) -> None:
    set_requires_grad(model, (name,), False)  # until it is active
    if trainable:
        state.trainable.add(name)


def activate(model: nn.Module, state: AdapterState, names: tuple[str, ...], inference_mode: bool | None = None) -> None:
    """Make these the active adapters, and freeze all others.

    Active adapters train if they are trainable. ``inference_mode=False`` makes them trainable. True freezes them until
    the next activation.
    """
    require_known(state, names)
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise AdapterNameError(
            f"{list(names)} names {twice} more than once: give each adapter once, and for a stronger one make it with "
            "add_weighted_adapter"
        )
    if len(names) > 1:
        _require_composable(model, names)
    state.active = names
    set_requires_grad(model, tuple(name for name in state.configs if name not in names), False)
    if inference_mode is False:
        state.trainable.update(names)
    for name in names:
        if inference_mode or name not in state.trainable:
            set_requires_grad(model, (name,), False)
        elif not any(p.requires_grad for held in holders(model, name) for p in held[name].parameters()):
            set_requires_grad(model, (name,), True)  # one of which a part was frozen by hand stays so


def make_trainable(model: nn.Module, state: AdapterState, names: tuple[str, ...], requires_grad: bool) -> None:
    """Let these adapters train, now and whenever they are active, or freeze them."""
    set_requires_grad(model, names, requires_grad)
    state.trainable = state.trainable | set(names) if requires_grad else state.trainable - set(names)


def delete(model: nn.Module, state: AdapterState, name: str) -> None:
    """Remove an adapter. If the last active one is removed, the first of the others becomes active."""
    require_known(state, (name,))
    if name in state.merged:
        raise AdapterNameError(f"adapter {name!r} is merged: call unmerge_adapter() first, or merge_and_unload()")
    was_active = name in state.active
    detach(model, state, name)
    if was_active and not state.active and state.configs:
        activate(model, state, (next(iter(state.configs)),))


def rename(model: nn.Module, state: AdapterState, old: str, new: str) -> None:
    """Rename an adapter everywhere; its parameters stay the same objects."""
    require_known(state, (old,))
    check_name(new, state)
    for held in holders(model, old):
        held[new] = held.pop(old)
    state.schedules = {new if name == old else name: kept for name, kept in state.schedules.items()}
    state.configs = {new if name == old else name: config for name, config in state.configs.items()}
    state.active = tuple(new if name == old else name for name in state.active)
    state.merged = tuple(new if name == old else name for name in state.merged)
    state.tasks = {new if name == old else name: task for name, task in state.tasks.items()}
    state.trainable = {new if name == old else name for name in state.trainable}


def choose_task(state: AdapterState, name: str, task: int | None) -> None:
    """Choose an adapter's task for rows that name no task. If ``task`` is None, every row must name its task.

    Raises AdapterNameError for an unknown name, or while adapters are merged, and ConfigError for an unknown task.
    """
    require_known(state, (name,))
    require_unmerged(state, f"choose a task of {name!r}")
    n_tasks = state.configs[name].n_tasks
    if not n_tasks:
        raise ConfigError(
            f"the adapter {name!r} ({state.configs[name].peft_type}) has no tasks: it acts on all rows. Leave task out"
        )
    if task is not None and task not in range(n_tasks):
        raise ConfigError(f"task={task!r} is no task of the adapter {name!r}: it has the tasks 0 to {n_tasks - 1}")
    state.tasks = {other: own for other, own in state.tasks.items() if other != name}
    if task is not None:
        state.tasks[name] = task


def holders(model: nn.Module, name: str) -> list[nn.ModuleDict]:
    """Return the containers that hold tensors of this adapter."""
    return [held for place in adapted_places(model).values() for held in place.holdings if name in held]


def set_requires_grad(model: nn.Module, names: tuple[str, ...], requires_grad: bool) -> None:
    """Set ``requires_grad`` of these adapters' parameters, without changing whether they are trainable when active."""
    for name in names:
        for held in holders(model, name):
            held[name].requires_grad_(requires_grad)


def remove_all(model: nn.Module, state: AdapterState) -> None:
    """Remove all adapters, and the check of the training steps."""
    for name in list(state.configs):
        detach(model, state, name)
    if state.watch is not None:
        state.watch.remove()


def _require_same_settings(model: nn.Module, own: MethodConfig, stored: MethodConfig, name: str) -> None:
    """Raise ConfigError unless the stored config means the same as ``own``, the config of the adapter ``name`` on the
    model.

    Both must have the same method and settings, and train the same whole modules.
    """
    if type(own) is not type(stored):
        raise ConfigError(
            f"adapter {name!r} is a {own.peft_type}, the files hold a {stored.peft_type}: load them by another name"
        )
    differ = own.differing(stored)
    paths = [path for path, _ in model.named_modules()]
    whole = [saved_paths(paths, config.modules_to_save or ()) for config in (own, stored)]
    differ += ["modules_to_save"] if whole[0] != whole[1] else []
    if differ:
        given = ", ".join(f"{key}={getattr(own, key)!r} here, {getattr(stored, key)!r} there" for key in differ)
        raise ConfigError(
            f"adapter {name!r} is here already with other settings than the files have ({given}): load them under "
            "another name"
        )


def require_unmerged(state: AdapterState, what: str) -> None:
    """Raise AdapterNameError while adapters are merged. ``what`` names the refused action in the message."""
    if state.merged:
        raise AdapterNameError(f"cannot {what} while {list(state.merged)} are merged: call unmerge_adapter() first")


def _require_composable(model: nn.Module, names: tuple[str, ...]) -> None:
    """Raise CompositionError if these adapters cannot be active together. The check needs no forward pass."""
    for path, module in adapted_modules(model).items():
        require_rows_agree(path, module, names)
        owned = [key for name in names if name in module.copies for key, _ in own_tensors(module.copies[name])]
        twice = sorted({key for key in owned if owned.count(key) > 1})
        if twice:
            raise CompositionError(
                f"adapters {list(names)} each have their own {path}.{twice[0]}: only one can be active at a time"
            )
    for module in adapted_layers(model).values():
        present = [name for name in names if name in module.adapters]
        if len(present) > 1:
            module.composed(present, module.site(present))

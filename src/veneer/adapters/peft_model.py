"""Adapted model: a mixin added to the model's own transformers class."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from torch.nn.modules.module import _IncompatibleKeys
from transformers import PreTrainedModel

from veneer.adapters import combining, lifecycle, merging, requantizing, saving, schedules
from veneer.adapters.card import write_card
from veneer.adapters.fused_head import scored_tokens
from veneer.adapters.overview import AdapterOverview
from veneer.adapters.placement import DeviceMap, require_same_place
from veneer.contract import MethodConfig
from veneer.contract.keys import is_adapters
from veneer.contract.source import adapter_folder, hub_options
from veneer.errors import ConfigError
from veneer.model.adapted.allocation import Allocation
from veneer.model.adapted.state import AdapterState
from veneer.model.batch.invocation import from_invocation, generating
from veneer.model.batch.mixed import TaskIds, mixed_batch
from veneer.model.batch.sequences import by_sequence, with_sequences
from veneer.model.fused.head import deferred_logits
from veneer.model.inplace import change_class, restore_class
from veneer.model.quantized.packed_linear import unpack
from veneer.plain.field_types import plain
from veneer.store.adapter.config import read_config
from veneer.store.adapter.tensors import Leniency, SaveEmbeddings
from veneer.store.adapter.tensors import assign as assign_adapter


class PeftModel(AdapterOverview):
    """Methods that `get_peft_model` adds to a transformers model. The model remains the same object."""

    _hf_peft_config_loaded: bool

    @classmethod
    def from_pretrained(
        cls,
        model: nn.Module,
        model_id: str | os.PathLike[str],
        adapter_name: str = "default",
        is_trainable: bool = False,
        config: MethodConfig | None = None,
        *,
        autocast_adapter_dtype: bool = True,
        ignore_mismatched_sizes: bool = False,
        key_mapping: Mapping[str, str] | None = None,
        device_map: DeviceMap = None,
        **hub: Any,
    ) -> PeftModel:
        """Attach a saved adapter to a model, in place, and activate it. It is frozen unless ``is_trainable``.

        ``model_id`` is a folder or a hub id; ``hub`` takes the fields of `HubOptions`. ``ignore_mismatched_sizes``:
        tensors of another shape than in the files start as in a new adapter. ``key_mapping``: see `renamed`.
        ``device_map``: an adapter is placed on its base's device, and any other device is refused.

        Raises FormatError if the files are damaged or do not fit the model. The model is then unchanged.
        """
        folder = adapter_folder(model_id, hub_options(hub))
        require_same_place(model, device_map)
        leniency = Leniency(ignore_mismatched_sizes, key_mapping)
        options = lifecycle.Loading(is_trainable, autocast_adapter_dtype, config or read_config(folder), leniency)
        with _becoming(model) as adapted:
            lifecycle.load(adapted, adapted.adapter_state, folder, adapter_name, options)
        adapted.set_adapter(adapter_name)
        return adapted

    def __call__(
        self, *args: Any, adapter_names: list[str] | None = None, task_ids: TaskIds | None = None, **kwargs: Any
    ) -> Any:
        """Run the model's forward pass. ``adapter_names`` gives each row an adapter of its own, of any method.

        Rows named ``"__base__"`` use no adapter. ``task_ids`` gives each row one of its adapter's tasks, if the adapter
        has several; without ``adapter_names`` they are tasks of the active adapter. Raises AdapterNameError for unknown
        names, ShapeError unless there is one name for each row, and CompositionError if rows of this model cannot use
        different adapters.
        """
        state, inputs = self.adapter_state, (args, kwargs)
        if "fused_lm_head" in kwargs and not args:
            named = {"adapter_names": adapter_names, "task_ids": task_ids}
            scored = scored_tokens(self, {**kwargs, **{key: each for key, each in named.items() if each is not None}})
            if scored is not None:
                return schedules.with_penalty(self, state, scored)
        if adapter_names is None and task_ids is None:
            if not by_sequence(state):  # torch.compile takes one context here, and not two
                with from_invocation(self, state, inputs):
                    return schedules.with_penalty(self, state, super().__call__(*args, **kwargs))
            with from_invocation(self, state, inputs), with_sequences(self, state, inputs):
                return schedules.with_penalty(self, state, super().__call__(*args, **kwargs))
        with (
            mixed_batch(self, state, adapter_names, inputs, task_ids),
            from_invocation(self, state, inputs),
            with_sequences(self, state, inputs),
        ):
            return super().__call__(*args, **kwargs)

    @classmethod
    def own_body(cls, base: type[nn.Module]) -> dict[str, Any]:
        """Return a ``forward`` that takes ``adapter_names`` and ``task_ids`` and calls the model. Its signature is that
        of the base's ``forward``.
        """
        return {"forward": _with_names(base.forward)}

    @property
    def base_model(self) -> nn.Module:
        """The model without its head, as in transformers, or this object itself if it has no such part."""
        return cast(nn.Module, getattr(super(), "base_model", self))

    def add_adapter(
        self,
        adapter_name: str,
        peft_config: MethodConfig,
        low_cpu_mem_usage: bool = False,
        *,
        autocast_adapter_dtype: bool = True,
    ) -> None:
        """Add a new adapter without activating it. ``low_cpu_mem_usage`` has no effect."""
        lifecycle.add(self, self.adapter_state, adapter_name, peft_config, Allocation(widen=autocast_adapter_dtype))

    def load_adapter(
        self,
        model_id: str | os.PathLike[str],
        adapter_name: str,
        is_trainable: bool = False,
        *,
        autocast_adapter_dtype: bool = True,
        ignore_mismatched_sizes: bool = False,
        key_mapping: Mapping[str, str] | None = None,
        device_map: DeviceMap = None,
        **hub: Any,
    ) -> _IncompatibleKeys:
        """Load a saved adapter without activating it. If the name exists already, load its values.

        The arguments are those of `from_pretrained`. Returns missing and unexpected keys, as PEFT does. Loading is
        strict, so only keys skipped by ``ignore_mismatched_sizes`` can be missing. Raises FormatError.
        """
        folder = adapter_folder(model_id, hub_options(hub))
        require_same_place(self, device_map)
        leniency = Leniency(ignore_mismatched_sizes, key_mapping)
        options = lifecycle.Loading(is_trainable, autocast_adapter_dtype, read_config(folder), leniency)
        return _IncompatibleKeys(lifecycle.load(self, self.adapter_state, folder, adapter_name, options), [])

    def set_adapter(self, adapter_name: str | list[str], inference_mode: bool | None = None) -> None:
        """Activate one adapter, or several together, and freeze all others, as PEFT does.

        An adapter that was added, or loaded with ``is_trainable``, trains while it is active. An adapter loaded frozen
        stays frozen unless ``inference_mode`` is False, PEFT's default. With True, the activated adapters are frozen.

        Raises AdapterNameError for an unknown name, CompositionError for adapters that cannot act together.
        """
        lifecycle.activate(self, self.adapter_state, _names(adapter_name), inference_mode)

    def delete_adapter(self, adapter_name: str) -> None:
        """Delete an adapter. If it was active, another becomes active. A merged adapter cannot be deleted."""
        lifecycle.delete(self, self.adapter_state, adapter_name)

    def rename_adapter(self, old: str, new: str) -> None:
        """Rename an adapter. If it is active or merged, it stays so. Raises AdapterNameError."""
        lifecycle.rename(self, self.adapter_state, old, new)

    def set_requires_grad(self, adapter_names: str | list[str], requires_grad: bool = True) -> None:
        """Let adapters train, now (active or not) and whenever they are active, or freeze them."""
        merging.require_known(self.adapter_state, _names(adapter_names))
        lifecycle.make_trainable(self, self.adapter_state, _names(adapter_names), requires_grad)

    def set_task(self, task: int | None, adapter_name: str | None = None) -> None:
        """Choose the task of an adapter, by default the active one, for rows that name no task.

        This task is also the one that is merged, combined and converted. If ``task`` is None, every row must name its
        task in ``task_ids``. Raises AdapterNameError for an unknown name, or while adapters are merged, and ConfigError
        for an unknown task.
        """
        lifecycle.choose_task(self.adapter_state, self.active_adapter if adapter_name is None else adapter_name, task)

    def add_weighted_adapter(
        self,
        adapters: list[str],
        weights: list[float],
        adapter_name: str,
        combination_type: str | None = None,
        svd_rank: int | None = None,
        *,
        density: float | None = None,
        majority_sign_method: str = "total",
        seed: int = 0,
    ) -> combining.Report:
        """Add a frozen adapter that combines others; ``weights`` are multiplied into it. Return the error of the rank
        reduction.

        ``combination_type`` is a type of `veneer.combine.Combination`; PEFT's "…_svd" names mean the same. "linear" is
        the exact sum here; PEFT's sum, with its cross terms, is "factorwise". None is PEFT's default: "svd", or
        "linear" if the adapters only rescale (IA3).

        Raises AdapterNameError and CompositionError.
        """
        weights = plain(weights)
        combining.require_types(
            adapters=adapters, weights=weights, combination_type=combination_type, svd_rank=svd_rank, density=density,
            seed=seed,
        )  # fmt: skip
        how = combination_type or combining.usual_way(self, adapters)
        plan = combining.plan_of(how, svd_rank, density, majority_sign_method, seed)
        if len(adapters) != len(weights):
            raise ConfigError(f"{len(adapters)} adapters and {len(weights)} weights: give one weight for each adapter")
        return combining.add_weighted(
            self, self.adapter_state, list(zip(adapters, weights, strict=True)), adapter_name, plan
        )

    @contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """Disable all adapters, merged ones too, inside the ``with`` block. Blocks may be nested."""
        state = self.adapter_state
        before, merged = state.disabled, state.merged
        if merged:
            merging.unmerge(self, state)
        state.disabled = True
        try:
            yield
        finally:
            state.disabled = before
            if merged:
                merging.merge(self, state, merged)

    def disable_adapter_layers(self) -> None:
        """Disable all adapters until `enable_adapter_layers` is called. Merged adapters are unmerged."""
        merging.unmerge(self, self.adapter_state)
        self.adapter_state.disabled = True

    def enable_adapter_layers(self) -> None:
        """Enable the active adapters again."""
        self.adapter_state.disabled = False

    def get_base_model(self) -> PreTrainedModel:
        """Return the transformers model: this same object."""
        return cast(PreTrainedModel, self)

    def update_and_allocate(self, global_step: int) -> None:
        """Run the active adapters' updates after an optimizer step (AdaLoRA reallocates its budget).

        Call it between ``optimizer.step()`` and ``zero_grad()`` with the number of the step. `SFTTrainer` makes this
        call. Raises ConfigError if no active adapter needs such updates.
        """
        schedules.begin(self, self.adapter_state)
        if not schedules.advance(self.adapter_state, global_step):
            raise ConfigError(f"none of the active adapters {self.active_adapters} has a schedule, as AdaLoRA has")

    def merge_adapter(self, adapter_names: str | list[str] | None = None, safe_merge: bool = False) -> None:
        """Merge the active adapters (or the named ones) into the weights, until `unmerge_adapter`."""
        merging.merge(self, self.adapter_state, self._to_merge(adapter_names), safe_merge)

    def unmerge_adapter(self) -> None:
        """Restore the base's own weights, bit for bit."""
        merging.unmerge(self, self.adapter_state)

    def merge_and_unload(
        self,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: str | list[str] | None = None,
        *,
        requantize: bool = False,
    ) -> PreTrainedModel:
        """Merge the active adapters (or the named ones) into the weights and return the plain model.

        A quantized model becomes dense, in the dtype that it had before. With ``requantize`` it stays quantized, and
        the surviving share of the update is printed.

        Raises CompositionError if the adapters cannot be merged and, with ``safe_merge``, if the result is not finite.
        Raises ConfigError for ``requantize`` if no adapted layer is quantized, or if one has a format that is only read
        (GPTQ, AWQ, HQQ, packed whole numbers, blocks of a GGUF file).
        """
        names = self._to_merge(adapter_names)
        if requantize:
            print(requantizing.describe(requantizing.merge_requantized(self, self.adapter_state, names, safe_merge)))
        else:
            merging.merge(self, self.adapter_state, names, safe_merge, progressbar)
            merging.settle(self)
        return self._unload()

    def unload(self) -> PreTrainedModel:
        """Remove all adapters and return the plain model, with its original weights."""
        merging.unmerge(self, self.adapter_state)
        return self._unload()

    def save_pretrained(
        self,
        save_directory: str | os.PathLike[str],
        safe_serialization: bool = True,
        selected_adapters: str | list[str] | None = None,
        save_embedding_layers: SaveEmbeddings = "auto",
        is_main_process: bool = True,
        *,
        state_dict: Mapping[str, torch.Tensor] | None = None,
        push_to_hub: bool = False,
        tags: str | list[str] | None = None,
        **hub: Any,
    ) -> None:
        """Write adapters in PEFT's format: ``default`` into the folder, any other into a subfolder of its name.

        ``tags`` go into the model card; ``hub`` takes ``repo_id`` and the fields of `Upload`.

        Raises ConfigError if pickles are asked for, and for an unknown argument. Raises AdapterNameError for an unknown
        adapter. Raises FormatError if writing fails; existing files are then untouched.
        """
        repo_id, how = str(hub.pop("repo_id", Path(save_directory).name)), saving.upload_of(hub)
        saving.require_safetensors(safe_serialization)
        if not is_main_process:
            return
        names = _names(selected_adapters) if selected_adapters is not None else tuple(self.peft_config)
        what = saving.Selection(names, save_embedding_layers, state_dict, _names(tags or []))
        saving.save(self, self.adapter_state, Path(save_directory), what)
        if push_to_hub:
            saving.upload(Path(save_directory), repo_id, how)

    def push_to_hub(
        self,
        repo_id: str,
        *,
        selected_adapters: str | list[str] | None = None,
        save_embedding_layers: SaveEmbeddings = "auto",
        safe_serialization: bool = True,
        tags: str | list[str] | None = None,
        **hub: Any,
    ) -> str:
        """Upload the adapters and a model card with ``tags`` added. Return the commit's URL.

        ``hub`` takes the fields of `Upload`. Raises as `save_pretrained` does.
        """
        saving.require_safetensors(safe_serialization)
        names = _names(selected_adapters) if selected_adapters is not None else tuple(self.peft_config)
        what = saving.Selection(names, save_embedding_layers, None, _names(tags or []))
        return saving.push(self, self.adapter_state, repo_id, what, saving.upload_of(hub))

    def create_or_update_model_card(self, output_dir: str | os.PathLike[str]) -> None:
        """Write the model card of the first adapter. A Trainer that pushes to the hub calls this."""
        write_card(Path(output_dir), next(iter(self.peft_config.values())))

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Load a state dict as torch does. If it is a Trainer checkpoint, its tensors are loaded into the adapters,
        strictly.

        Such a checkpoint holds one adapter's file, for the active adapter, or several adapters by name. Raises
        AdapterNameError if one of them is not on the model, and FormatError.
        """
        if state_dict and all(is_adapters(key) for key in state_dict):
            load_into_active(self, state_dict)
            return _IncompatibleKeys([], [])
        parts = saving.divided(state_dict)
        if parts:
            merging.require_known(self.adapter_state, tuple(parts))
            for name, tensors in parts.items():
                assign_adapter(self, self.adapter_state, name, tensors, source="the checkpoint")
            return _IncompatibleKeys([], [])
        return super().load_state_dict(state_dict, strict, assign)

    def _to_merge(self, adapter_names: str | list[str] | None) -> tuple[str, ...]:
        return _names(adapter_names) if adapter_names is not None else self.adapter_state.active

    def _unload(self) -> PreTrainedModel:
        lifecycle.remove_all(self, self.adapter_state)
        unpack(self)
        del self.adapter_state, self._hf_peft_config_loaded
        restore_class(self)
        return cast(PreTrainedModel, self)


class GeneratingPeftModel(PeftModel):
    """`PeftModel` that generates."""

    def generate(
        self, *args: Any, adapter_names: list[str] | None = None, task_ids: TaskIds | None = None, **kwargs: Any
    ) -> Any:
        """Run transformers' ``generate``. ``adapter_names`` and ``task_ids`` give each prompt its own adapter and task,
        as in a forward pass.
        """
        generate, state, inputs = cast(Any, super()).generate, self.adapter_state, (args, kwargs)
        if adapter_names is None and task_ids is None:
            with generating(state, inputs):
                return generate(*args, **kwargs)
        with mixed_batch(self, state, adapter_names, inputs, task_ids), generating(state, inputs):
            return generate(*args, **kwargs)


def get_peft_model(
    model: nn.Module,
    peft_config: MethodConfig,
    adapter_name: str = "default",
    mixed: bool = False,
    *,
    autocast_adapter_dtype: bool = True,
    revision: str | None = None,
    low_cpu_mem_usage: bool = False,
) -> PeftModel:
    """Attach a new, active, trainable adapter to a model, in place, and freeze everything else.

    Initial values are drawn from torch's global generator: ``torch.manual_seed`` makes them reproducible. On a 16-bit
    base the adapter is float32 unless ``autocast_adapter_dtype`` is False. ``revision`` is stored in the config.
    ``mixed`` and ``low_cpu_mem_usage`` have no effect: every model takes adapters of all methods, and parameters are
    made only once.

    Raises TargetError and AdapterNameError; the model is then unchanged.
    """
    allocation = Allocation(widen=autocast_adapter_dtype)
    with _becoming(model) as adapted:
        lifecycle.add(adapted, adapted.adapter_state, adapter_name, lifecycle.noted(peft_config, revision), allocation)
    adapted.set_adapter(adapter_name)
    return adapted


@contextmanager
def _becoming(model: nn.Module) -> Iterator[PeftModel]:
    """Yield the model as a `PeftModel`. If the block raises, a model that was plain before becomes plain again."""
    fresh = not isinstance(model, PeftModel)
    adapted = become_peft_model(model)
    try:
        yield adapted
    except BaseException:
        if fresh:
            adapted.unload()
        raise


def become_peft_model(model: nn.Module) -> PeftModel:
    """Return the model with `PeftModel` added to its class. If it was plain before, its parameters are frozen."""
    if not isinstance(model, PeftModel):
        change_class(model, GeneratingPeftModel if hasattr(model, "generate") else PeftModel)
        adapted = cast(PeftModel, model)
        adapted.adapter_state = AdapterState()
        adapted._hf_peft_config_loaded = True
        lifecycle.prepare(adapted, adapted.adapter_state)
    return cast(PeftModel, model)


def _with_names(plain: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(plain)  # those who ask for the arguments (Trainer, generate) find the model's own
    def forward(
        self: PeftModel,
        *args: Any,
        adapter_names: list[str] | None = None,
        task_ids: TaskIds | None = None,
        **kwargs: Any,
    ) -> Any:
        if adapter_names is None and task_ids is None:
            return _plainly(plain, self, args, kwargs)
        with mixed_batch(self, self.adapter_state, adapter_names, (args, kwargs), task_ids):
            return _plainly(plain, self, args, kwargs)

    return forward


def _plainly(plain: Callable[..., Any], model: PeftModel, args: Any, kwargs: dict[str, Any]) -> Any:
    """Run the model's own forward pass. If labels are given and the head is frozen, the loss is computed from the
    hidden states, chunk by chunk, so the logits of all tokens are never in memory at once.
    """
    if kwargs.get("labels") is None or torch.compiler.is_compiling():
        return plain(model, *args, **kwargs)
    with deferred_logits(model):
        return plain(model, *args, **kwargs)


def load_into_active(model: PeftModel, tensors: Mapping[str, torch.Tensor]) -> None:
    """Load the tensors of a file into the active adapter."""
    assign_adapter(model, model.adapter_state, model.active_adapter, tensors, source="the state dict")


def _names(given: str | list[str]) -> tuple[str, ...]:
    return (given,) if isinstance(given, str) else tuple(given)

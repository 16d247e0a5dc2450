"""The face of an adapted model: a mixin in front of the transformers class that the model has anyway."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from transformers import PreTrainedModel

from veneer.adapters.merging import merge_into_base
from veneer.core.method import MethodConfig
from veneer.errors import AdapterNameError
from veneer.model.attach import attach, detach
from veneer.model.inplace import InPlace, change_class, restore_class
from veneer.model.state import AdapterState
from veneer.store.adapter import load_weights, read_config, save_adapter


class PeftModel(InPlace, nn.Module):
    """What `get_peft_model` adds to a transformers model. The model stays the object that it was."""

    adapter_state: AdapterState
    _hf_peft_config_loaded: bool

    @classmethod
    def from_pretrained(
        cls,
        model: PreTrainedModel,
        model_id: str | os.PathLike[str],
        adapter_name: str = "default",
        is_trainable: bool = False,
        config: MethodConfig | None = None,
    ) -> PeftModel:
        """Put a saved adapter on a model. It is frozen unless ``is_trainable``."""
        config = config or read_config(Path(model_id))
        adapted = get_peft_model(model, config, adapter_name)
        load_weights(cast(PreTrainedModel, adapted), adapted.adapter_state, adapter_name, Path(model_id))
        adapted.set_requires_grad(adapter_name, is_trainable)
        if not is_trainable:
            adapted.eval()
        return adapted

    @property
    def peft_config(self) -> Mapping[str, MethodConfig]:
        """The configs by adapter name."""
        return self.adapter_state.configs

    @property
    def active_adapters(self) -> list[str]:
        """The names of the active adapters."""
        return list(self.adapter_state.active)

    @property
    def active_adapter(self) -> str:
        """The name of the first active adapter."""
        return self.adapter_state.active[0]

    def add_adapter(self, adapter_name: str, peft_config: MethodConfig) -> None:
        """Add a fresh adapter beside those there are; it does not become active."""
        attach(cast(PreTrainedModel, self), peft_config, adapter_name, self.adapter_state)

    def load_adapter(self, model_id: str | os.PathLike[str], adapter_name: str, is_trainable: bool = False) -> None:
        """Load a saved adapter beside those there are, or, under a name that is there, its values. Not activated."""
        if adapter_name not in self.peft_config:
            self.add_adapter(adapter_name, read_config(Path(model_id)))
            self.set_requires_grad(adapter_name, is_trainable)
        load_weights(cast(PreTrainedModel, self), self.adapter_state, adapter_name, Path(model_id))

    def set_adapter(self, adapter_name: str | list[str]) -> None:
        """Make one adapter, or several together, the active ones."""
        names = (adapter_name,) if isinstance(adapter_name, str) else tuple(adapter_name)
        unknown = [name for name in names if name not in self.peft_config]
        if unknown or not names:
            raise AdapterNameError(f"no adapter named {unknown}; loaded: {sorted(self.peft_config)}")
        self.adapter_state.active = names

    def delete_adapter(self, adapter_name: str) -> None:
        """Take an adapter off for good."""
        if adapter_name not in self.peft_config:
            raise AdapterNameError(f"no adapter named {adapter_name!r}; loaded: {sorted(self.peft_config)}")
        detach(cast(PreTrainedModel, self), self.adapter_state, adapter_name)

    def set_requires_grad(self, adapter_names: str | list[str], requires_grad: bool = True) -> None:
        """Make the parameters of adapters trainable, or freeze them."""
        names = (adapter_names,) if isinstance(adapter_names, str) else adapter_names
        for path, parameter in self.named_parameters():
            if any(f".adapters.{name}." in path for name in names):
                parameter.requires_grad_(requires_grad)

    @contextlib.contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """Inside the block the model is the base model."""
        before, self.adapter_state.disabled = self.adapter_state.disabled, True
        try:
            yield
        finally:
            self.adapter_state.disabled = before

    def get_base_model(self) -> PreTrainedModel:
        """The transformers model: this very object."""
        return cast(PreTrainedModel, self)

    def get_nb_trainable_parameters(self) -> tuple[int, int]:
        """Trainable parameters, and all of them."""
        sizes = [(p.numel(), p.requires_grad) for p in self.parameters()]
        return sum(n for n, trains in sizes if trains), sum(n for n, _ in sizes)

    def print_trainable_parameters(self) -> None:
        """Print the number of trainable parameters, of all, and their ratio in percent."""
        trainable, total = self.get_nb_trainable_parameters()
        print(
            f"trainable params: {trainable:,d} || all params: {total:,d} || trainable%: {100 * trainable / total:.4f}"
        )

    def merge_and_unload(
        self, progressbar: bool = False, safe_merge: bool = False, adapter_names: list[str] | None = None
    ) -> PreTrainedModel:
        """Fold the active adapters (or those named) into the weights and give back the plain model."""
        merge_into_base(self, tuple(adapter_names) if adapter_names else self.adapter_state.active)
        return self.unload()

    def unload(self) -> PreTrainedModel:
        """Take every adapter off and give back the plain model."""
        for name in list(self.peft_config):
            detach(cast(PreTrainedModel, self), self.adapter_state, name)
        del self.adapter_state, self._hf_peft_config_loaded
        restore_class(self)
        return cast(PreTrainedModel, self)

    def save_pretrained(
        self,
        save_directory: str | os.PathLike[str],
        selected_adapters: list[str] | None = None,
        is_main_process: bool = True,
        state_dict: Mapping[str, torch.Tensor] | None = None,
        **kwargs: Any,
    ) -> None:
        """Write adapters in PEFT's format: ``default`` into the folder, any other into a folder of its name there."""
        for name in selected_adapters or list(self.peft_config):
            folder = Path(save_directory) if name == "default" else Path(save_directory) / name
            if is_main_process:
                save_adapter(cast(PreTrainedModel, self), self.adapter_state, name, folder)


def get_peft_model(model: PreTrainedModel, peft_config: MethodConfig, adapter_name: str = "default") -> PeftModel:
    """Put a fresh, active, trainable adapter on a model, in place, and freeze everything else."""
    if not isinstance(model, PeftModel):
        model.requires_grad_(False)
        change_class(model, PeftModel)
        model.adapter_state = AdapterState()
        model._hf_peft_config_loaded = True
    adapted = cast(PeftModel, model)
    try:
        adapted.add_adapter(adapter_name, peft_config)
    except BaseException:
        if not adapted.peft_config:
            adapted.unload()
        raise
    adapted.set_adapter(adapter_name)
    return adapted

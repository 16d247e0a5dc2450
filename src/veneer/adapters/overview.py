"""Summary of a model's adapters: names and configs, adapted modules, trained parameters."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from veneer.adapters import status
from veneer.contract import MethodConfig
from veneer.errors import ConfigError
from veneer.model.adapted.state import AdapterState
from veneer.model.attach.attach import adapted_layers
from veneer.model.inplace import InPlace


class AdapterOverview(InPlace, nn.Module):
    """Read-only part of a `PeftModel`."""

    adapter_state: AdapterState

    @property
    def has_active_enabled_adapter(self) -> bool:
        """Return True if an adapter is active and adapters are not disabled."""
        return bool(self.adapter_state.active) and not self.adapter_state.disabled

    @property
    def targeted_module_names(self) -> list[str]:
        """Paths of the modules that adapters change."""
        return list(adapted_layers(self))

    @property
    def peft_config(self) -> Mapping[str, MethodConfig]:
        """Configs by adapter name."""
        return self.adapter_state.configs

    @property
    def active_adapters(self) -> list[str]:
        """Names of the active adapters."""
        return list(self.adapter_state.active)

    @property
    def active_adapter(self) -> str:
        """Name of the first active adapter. Raises ConfigError if none is active."""
        if not self.adapter_state.active:
            raise ConfigError(
                f"no adapter is active; loaded: {sorted(self.peft_config)}. Call set_adapter with a name."
            )
        return self.adapter_state.active[0]

    @property
    def active_peft_config(self) -> MethodConfig:
        """Config of the first active adapter. Raises ConfigError if none is active."""
        return self.peft_config[self.active_adapter]

    def get_nb_trainable_parameters(self) -> tuple[int, int]:
        """Return the number of trainable parameters, and of all parameters.

        A quantized weight counts with the number of its dense values.
        """
        return status.count_parameters(self)

    def print_trainable_parameters(self) -> None:
        """Print the trainable and total parameters, their ratio in percent, and the modules each adapter changes."""
        trainable, total = self.get_nb_trainable_parameters()
        ratio = 100 * trainable / total
        print(f"trainable params: {trainable:,d} || all params: {total:,d} || trainable%: {ratio:.4f}")
        print(status.describe_targets(self, self.adapter_state))

    def get_layer_status(self) -> list[status.TunerLayerStatus]:
        """Return the status of each adapted module."""
        return status.get_layer_status(self)

    def get_model_status(self) -> status.TunerModelStatus:
        """Return the status of the model."""
        return status.get_model_status(self)

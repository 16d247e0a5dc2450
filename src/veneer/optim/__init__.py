"""Memory-efficient optimizers: AdamW with 8-bit moments, its paged form, GaLore, and LoRA+'s parameter groups."""

from __future__ import annotations

from veneer.optim.adamw_8bit import AdamW8bit
from veneer.optim.galore import GaLoreAdamW
from veneer.optim.layerwise import LayerwiseGaLoreAdamW
from veneer.optim.lora_plus import lora_plus_groups
from veneer.optim.paged import PagedAdamW8bit

__all__ = ["AdamW8bit", "GaLoreAdamW", "LayerwiseGaLoreAdamW", "PagedAdamW8bit", "lora_plus_groups"]

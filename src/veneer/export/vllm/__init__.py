"""Export of adapters of any low-rank method as plain LoRA, for vLLM and LoRAX."""

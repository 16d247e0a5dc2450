"""Adapted models under PEFT's names: `get_peft_model` and `PeftModel`."""

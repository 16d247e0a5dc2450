"""Model with its adapters, in PEFT's words: `get_peft_model` and `PeftModel`."""

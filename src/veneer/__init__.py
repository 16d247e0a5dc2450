"""veneer: parameter-efficient fine-tuning, from planning to serving."""

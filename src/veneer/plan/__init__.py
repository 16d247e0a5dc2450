"""Memory and time of a run before anything is loaded: the step itself, traced on tensors without values.

`plan.memory_trace` counts the bytes of activations. `model.fused.saved_bytes` counts those that one fused block saves.
"""

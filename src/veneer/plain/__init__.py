"""Plain things that know neither tensors' meaning nor models: names, units, progress, caches, frozen configs."""

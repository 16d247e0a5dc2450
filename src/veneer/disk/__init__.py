"""Files on disk, which know no model and no method: atomic writes, whole folders, safetensors, downloads, the cache."""

"""Files on disk, independent of models and methods: atomic writes, whole folders, safetensors, downloads, the cache."""

"""Training run written down: the YAML file, its parts and its checks."""

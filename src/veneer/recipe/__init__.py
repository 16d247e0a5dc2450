"""Recipe of a training run: the YAML file, its parts and its checks. `recipe.parts` declares the keys."""

"""The commands, one file per verb; `app` mounts them."""

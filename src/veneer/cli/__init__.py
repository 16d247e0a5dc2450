"""Commands, one file per verb; `app` mounts them."""

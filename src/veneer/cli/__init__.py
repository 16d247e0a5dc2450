"""Commands, one file for each verb; `app` mounts them."""

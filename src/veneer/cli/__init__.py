"""Commands, which `app` mounts: a page with arguments and help for each verb (`pages`), and files that do the work."""

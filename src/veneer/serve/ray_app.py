"""Name that Ray Serve's configs of earlier versions import: ``veneer.serve.ray_app:app``."""

from veneer.ray.serving.app import app

__all__ = ["app"]

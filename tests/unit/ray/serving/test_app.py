"""Arguments of the application for Ray Serve, and what is said without Ray."""

from __future__ import annotations

import sys

import pytest

from veneer.errors import ConfigError
from veneer.ray.serving.app import app
from veneer.ray.serving.arguments import arguments_of
from veneer.serve.http.server_limits import ServerLimits

LIMITS = {"choices": "5", "trust_request_templates": "false"}


def test_arguments_are_those_of_a_command_line_or_of_a_file():
    given = arguments_of({"model": "/m", "replicas": "3", "cpus": 2, "limits": LIMITS})
    assert (given.base, given.replicas, given.cpus) == ("/m", 3, 2)
    assert given.limits == ServerLimits(choices=5)
    assert not given.engine_options().disable_log_stats  # which /metrics needs
    given = arguments_of({"model": "/m", "served_model_name": "base", "engine_kwargs": {"max_loras": 7}})
    options = given.engine_options()
    assert (given.base, options.served_model_name, options.max_loras) == ("base", "base", 7)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"replicas": 0}, "replicas: must be at least 1"),
        ({"adapter": "x"}, "adapter: is unknown. Known: model, adapters, keys"),
        ({"limits": {"choice": 3}}, "limits.choice: Unexpected keyword argument.* as limits: body_bytes, choices"),
        ({"limits": {"in_flight": "many"}}, "limits.in_flight: must be a whole number"),
        ({"limits": {"choices": 0}}, "choices=0 must be at least 1"),
        ({"engine_kwargs": {"max_lora": 3}}, "did you mean 'max_loras'"),
        ({"engine_kwargs": {"max_loras": 0}}, "max_loras=0 must be at least 1"),
    ],
)
def test_wrong_arguments_are_refused_before_anything_starts(changes, said):
    with pytest.raises(ConfigError, match=said):
        arguments_of({"model": "/m"} | changes)


def test_without_ray_it_is_said_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    monkeypatch.delitem(sys.modules, "veneer.ray.serving.deployments", raising=False)
    with pytest.raises(ConfigError, match=r"pip install 'veneer\[ray\]'"):
        app({"model": "/m"})

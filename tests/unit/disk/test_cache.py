"""The cache folder: the user's, or the platform's."""

from __future__ import annotations

import pytest

from veneer.disk import cache


@pytest.mark.parametrize(
    ("platform", "variables", "expected"),
    [
        ("linux", {"VENEER_CACHE": "/x/own"}, "/x/own"),
        ("linux", {"XDG_CACHE_HOME": "/x/cache"}, "/x/cache/veneer"),
        ("linux", {"XDG_CACHE_HOME": ""}, "/home/u/.cache/veneer"),
        ("darwin", {}, "/home/u/Library/Caches/veneer"),
        ("win32", {"LOCALAPPDATA": "/x/local"}, "/x/local/veneer"),
    ],
)
def test_the_cache_folder_follows_the_platform(
    monkeypatch: pytest.MonkeyPatch, platform: str, variables: dict[str, str], expected: str
) -> None:
    for name in ("VENEER_CACHE", "XDG_CACHE_HOME", "LOCALAPPDATA"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("HOME", "/home/u")
    monkeypatch.setattr(cache.sys, "platform", platform)
    assert str(cache.cache_dir()) == expected

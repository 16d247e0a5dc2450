"""Keys in a file, and which of them may do what."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from patience import wait_until
from veneer.cli import add_key
from veneer.cli.app import app
from veneer.cli.pages.add_key import AddKeyArguments
from veneer.errors import ConfigError
from veneer.serve.http import access
from veneer.serve.http.access import scopes_of
from veneer.serve.http.errors import RefusedError, TooManyRequestsError
from veneer.serve.http.key import ADMIN, INFER, Key
from veneer.serve.http.key_file import Keys, read_keys
from veneer.serve.http.quota import Quotas
from veneer.serve.schedule import in_flight


def digest(token: str) -> str:
    return hashlib.sha256(token.encode()).hexdigest()


def write(path: Path, *entries: dict[str, Any]) -> Path:
    path.write_text(json.dumps([{"sha256": digest(entry["name"]), **entry} for entry in entries]))
    return path


def test_a_key_is_found_by_its_digest(tmp_path):
    file = tmp_path / "keys.yaml"
    file.write_text(
        f"# ours\n- name: alice\n  sha256: {digest('of alice')}\n  scopes: [infer, admin]\n  adapters: [sql-*, chat]\n"
        f"  weight: 3\n  max_requests: 7\n  max_tokens: 9000\n- {{name: bob, sha256: {digest('of bob')}}}\n"
    )
    keys = Keys(file)
    assert keys.find("of alice") == Key(
        name="alice", scopes=frozenset({INFER, ADMIN}), adapters=("sql-*", "chat"), weight=3.0, max_requests=7,
        max_tokens=9000,
    )  # fmt: skip
    assert keys.find("of bob") == Key(name="bob", scopes=frozenset({INFER}))
    for unknown in ("", "of alice ", "alice", digest("of alice"), "\udc80", "x" * 10**6):
        assert keys.find(unknown) is None


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("a: 1", "is no list of keys: must be a list"),
        ("[1]", "entry 1: must be an object (keys with values)"),
        (f"[{{name: a, sha256: {'a' * 63}}}]", "entry 1: sha256: String should match pattern"),
        (f"[{{name: a, sha256: {'A' * 64}}}]", "entry 1: sha256"),
        (f"[{{name: '', sha256: {'a' * 64}}}]", "entry 1: name: must be text of at least 1 character"),
        (f"[{{name: a, sha256: {'a' * 64}, scopes: [root]}}]", "entry 1: scopes: must be 'infer' or 'admin'"),
        (f"[{{name: a, sha256: {'a' * 64}, scopes: []}}]", "entry 1: scopes: must be a list of at least 1 entry"),
        (f"[{{name: a, sha256: {'a' * 64}, weigth: 2}}]", "entry 1: weigth: is unknown"),
        (f"[{{name: a, sha256: {'a' * 64}, weight: 0}}]", "entry 1: weight"),
        (f"[{{name: a, sha256: {'a' * 64}, weight: .nan}}]", "entry 1: weight"),
        (f"[{{name: a, sha256: {'a' * 64}, max_tokens: 0}}]", "entry 1: max_tokens"),
        (f"[{{name: a, sha256: {'a' * 64}}}, {{name: a, sha256: {'b' * 64}}}]", "name 'a' is given 2 times"),
        (f"[{{name: a, sha256: {'a' * 64}}}, {{name: b, sha256: {'a' * 64}}}]", "is given 2 times"),
        ("[", "while parsing"),
        ("[2026-13-45]", "month must be in 1..12"),
        ("[" * 5000, "recursion"),
        (b"\xff", "keys.yaml is no list of keys"),
        (None, "cannot be read: No such file"),
        *(
            (none, "is empty: it needs at least one key. Add one with `veneer add-key NAME")
            for none in ("", "# a\n", "[]")
        ),
    ],
)
def test_a_file_that_is_wrong_is_told(tmp_path, content, said):
    file = tmp_path / "keys.yaml"
    if content is not None:
        file.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ConfigError, match=r"^--keys .*keys.yaml") as told:
        read_keys(file)
    assert said in str(told.value)


def test_the_file_is_read_again_when_it_changes_and_a_bad_one_keeps_the_old(tmp_path, caplog):
    file = write(tmp_path / "keys.json", {"name": "alice"})
    keys = Keys(file)
    keys.start()
    try:
        new = write(tmp_path / "new", {"name": "bob"}, {"name": "carol"})
        new.replace(file)
        wait_until(lambda: keys.find("bob") is not None)
        assert keys.find("alice") is None
    finally:
        keys.stop()
    with caplog.at_level(logging.ERROR, "uvicorn.error"):
        file.write_text("[{name: alice}]")
        keys.look(), keys.look()
        assert keys.find("bob") is not None
        file.unlink()
        keys.look(), keys.look()
        file.write_text("")
        keys.look(), keys.look()
        assert keys.find("carol") is not None
    said = [record.getMessage() for record in caplog.records if record.levelno == logging.ERROR]
    assert len(said) == 3
    assert "entry 1: sha256: is missing" in said[0]
    assert "cannot be read" in said[1]
    assert "is empty" in said[2]
    assert all(each.endswith("The keys that were read before stay in use") for each in said)
    write(file, {"name": "alice"})
    keys.look()
    assert keys.find("alice") is not None
    assert keys.find("carol") is None


def test_patterns_of_adapters():
    key = Key(adapters=("sql-*", "[ab]?", "chat"))
    names = ("sql-", "sql-x/y", "a1", "chat", "c1", "a", "chats", "SQL-x", "sql", "")
    assert [name for name in names if key.sees(name)] == ["sql-", "sql-x/y", "a1", "chat"]
    assert Key().sees("anything")
    assert not Key(adapters=()).sees("anything")


@pytest.mark.parametrize(
    ("method", "path", "scopes"),
    [
        ("GET", "/health", ""), ("GET", "/ready", ""), ("GET", "/version", ""), ("GET", "/", ""),
        ("GET", "/metrics", "admin"), ("GET", "/metrics/", "admin"), ("POST", "/v1/load_lora_adapter", "admin"),
        ("POST", "/v1/load_lora_adapter/", "admin"), ("POST", "/v1/unload_lora_adapter", "admin"),
        ("GET", "/v1/adapters", "admin infer"), ("GET", "/v1/adapters/a/b", "admin infer"),
        ("POST", "/v1/adapters/a/pin", "admin"), ("DELETE", "/v1/adapters/a", "admin"),
        ("GET", "/v1/models/a", "admin infer"), ("POST", "/v1/completions", "infer"), ("POST", "/tokenize", "infer"),
        ("GET", "/health/", "infer"), ("GET", "//health", "infer"), ("GET", "/docs", "infer"),
        ("GET", "/healthz", "infer"), ("GET", "/v1/adapters_of_mine", "infer"), ("OPTIONS", "/v1/adapters", "admin"),
    ],
)  # fmt: skip
def test_scopes_of_routes(method, path, scopes):
    assert scopes_of(method, path) == frozenset(scopes.split())


def test_who_is_on_this_machine():
    near = [access._is_near(client) for client in (("127.0.0.1", 7), ("::1", 7), ("127.8.0.3", 1), None)]
    far = [access._is_near(client) for client in (("10.0.0.3", 7), ("::2", 7), ("localhost", 7), ("", 0))]
    assert (near, far) == ([True] * 4, [False] * 4)


def test_a_quota_is_taken_and_given_back():
    quotas, alice, bob = Quotas(), Key(name="alice", max_requests=5), Key(name="bob", max_requests=5)
    with quotas.choices(alice, 3):
        with quotas.choices(bob, 5), quotas.choices(alice, 2):
            pass
        with pytest.raises(TooManyRequestsError, match=r"3 choices .* it may have 5 \(its max_requests\)"):
            quotas.choices(alice, 3).__enter__()
    with pytest.raises(RefusedError, match=r"6 choices .* are asked for, and this key may have 5") as refused:
        quotas.choices(alice, 6).__enter__()
    assert refused.value.status == 400
    with quotas.choices(Key(), 10**6), quotas.tokens(alice, 10**6):
        pass


@pytest.mark.parametrize(("n", "seconds"), [(3, 37), (4, 60)])
def test_a_key_is_told_when_enough_of_its_choices_will_have_ended(monkeypatch, n, seconds):
    now = 100.0
    monkeypatch.setattr(in_flight, "monotonic", lambda: now)
    quotas, key = Quotas(), Key(name="alice", max_requests=5)
    for _ in range(4):  # one ends after a minute, and nothing is asked for a quarter of an hour
        with quotas.choices(key, 1):
            now += 60
        now += 900
    with quotas.choices(key, 3):
        now += 23
        with quotas.choices(key, 2), pytest.raises(TooManyRequestsError, match=f"ask again in {seconds} s"):
            quotas.choices(key, n).__enter__()


def test_tokens_count_apart_from_choices():
    quotas, key = Quotas(), Key(name="a", max_tokens=100)
    with quotas.tokens(key, 60), quotas.choices(key, 1000), pytest.raises(TooManyRequestsError, match="60 tokens"):
        quotas.tokens(key, 41).__enter__()
    with quotas.tokens(key, 100):
        pass
    with pytest.raises(RefusedError, match=r"\(its max_tokens\): send max_tokens \(max_completion_tokens, "):
        quotas.tokens(key, 101).__enter__()


def test_a_key_that_is_made_is_one_of_the_file(tmp_path):
    file = tmp_path / "keys.yaml"
    made = CliRunner().invoke(app, ["add-key", "alice", "--file", str(file)])
    assert made.exit_code == 0
    file.write_text("# ours\n" + file.read_text())
    more = ["--scope", "infer", "--scope", "admin", "--sees", "sql-*", "--weight", "2", "--max-requests", "7"]
    other = CliRunner().invoke(app, ["add-key", "bob", "--file", str(file), *more, "--max-tokens", "900"])
    keys = Keys(file)
    assert keys.find(made.stdout.strip()) == Key(name="alice", scopes=frozenset({INFER}))
    assert keys.find(other.stdout.strip()) == Key(
        name="bob", scopes=frozenset({INFER, ADMIN}), adapters=("sql-*",), weight=2.0, max_requests=7, max_tokens=900
    )
    assert file.read_text().startswith("# ours\n")
    assert made.stdout.strip() not in file.read_text()
    assert file.stat().st_mode & 0o777 == 0o600
    again = CliRunner().invoke(app, ["add-key", "bob", "--file", str(file)])
    assert again.exit_code == 2
    assert "has a key of the name 'bob' already" in " ".join(again.output.split())
    wrong = CliRunner().invoke(app, ["add-key", "carol", "--file", str(file), "--scope", "root"])
    assert (wrong.exit_code, len(read_keys(file))) == (2, 2)
    as_json = write(tmp_path / "keys.json", {"name": "alice"})
    as_json.write_text(as_json.read_text().replace('"name"', "name"))  # YAML
    as_json.chmod(0o640)
    made = CliRunner().invoke(app, ["add-key", "bob", "--file", str(as_json)])
    assert [entry["name"] for entry in json.loads(as_json.read_text())] == ["alice", "bob"]
    assert Keys(as_json).find(made.stdout.strip()) is not None
    assert as_json.stat().st_mode & 0o777 == 0o640


def test_a_key_is_added_to_an_empty_file_and_to_none_in_a_missing_folder(tmp_path):
    file = tmp_path / "keys.yaml"
    file.touch()
    made = CliRunner().invoke(app, ["add-key", "alice", "--file", str(file)])
    assert Keys(file).find(made.stdout.strip()) == Key(name="alice", scopes=frozenset({INFER}))
    missing = CliRunner().invoke(app, ["add-key", "bob", "--file", str(tmp_path / "none" / "keys.yaml")])
    assert missing.exit_code == 2
    assert "is in no folder" in " ".join(missing.output.split())
    assert not (tmp_path / "none").exists()


def test_a_file_that_everybody_may_write_or_replace_is_refused(tmp_path, caplog):
    folder = tmp_path / "keys"
    folder.mkdir()
    file = write(folder / "keys.json", {"name": "alice"})
    file.chmod(0o664)
    keys = Keys(file)
    file.chmod(0o666)
    with pytest.raises(
        ConfigError, match=r"can be written by everybody, so anybody can add keys: run `chmod o-w .*keys.json`"
    ):
        read_keys(file)
    with caplog.at_level(logging.ERROR, "uvicorn.error"):
        write(file, {"name": "mallory"})
        keys.look()
    assert (keys.find("alice") is None, keys.find("mallory") is None) == (False, True)
    assert "can be written by everybody" in caplog.text
    file.chmod(0o600)
    folder.chmod(0o777)
    with pytest.raises(
        ConfigError,
        match=r"can be replaced by everybody, because everybody can write its folder: run `chmod o-w .*/keys`",
    ):
        read_keys(file)
    folder.chmod(0o1777)
    assert len(read_keys(file)) == 1


def test_a_new_file_is_its_owners_alone_from_the_first_moment(tmp_path, monkeypatch):
    file, seen = tmp_path / "keys.yaml", []
    replace = Path.replace

    def watched(self: Path, target: Path) -> Path:
        seen.append(self.stat().st_mode & 0o777)
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", watched)
    monkeypatch.setattr(
        Path, "chmod", lambda self, mode: pytest.fail("opened") if mode & 0o077 else os.chmod(self, mode)
    )
    assert CliRunner().invoke(app, ["add-key", "alice", "--file", str(file)]).exit_code == 0
    assert (seen, file.stat().st_mode & 0o777) == ([0o600], 0o600)


def test_keys_that_are_added_at_once_are_all_kept(tmp_path, monkeypatch):
    file = tmp_path / "keys.yaml"
    written = add_key.write_atomically
    monkeypatch.setattr(add_key, "write_atomically", lambda *given: time.sleep(0.05) or written(*given))
    threads = [
        threading.Thread(target=add_key.add_key, args=(AddKeyArguments(name=f"k{n}", file=file),)) for n in range(6)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(key.name or "" for _, key in read_keys(file)) == [f"k{n}" for n in range(6)]

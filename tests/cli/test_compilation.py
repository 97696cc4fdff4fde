"""The compilation cache of a command: found by the next one, and no reason for one to fail."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from jaxlora.cli import compilation

PROGRAM = """
import sys
from jaxlora.cli.compilation import use_compilation_cache
print(use_compilation_cache())
import jax, jax.numpy as jnp
hits = []
jax.monitoring.register_event_listener(lambda name, **_: hits.append(name.rpartition("/")[2]))
print(float(jax.jit(lambda x: jnp.tanh(x @ x).sum())(jnp.ones((8, 8)))))
print("hit" if "cache_hits" in hits else "miss")
"""


def run(cache: Path, **variables: str) -> tuple[list[str], str]:
    """Lines of output and errors of a process that compiles one small program."""
    env = {name: value for name, value in os.environ.items() if "COMPILATION_CACHE" not in name}
    env |= {"JAXLORA_CACHE": str(cache), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    command = [sys.executable, "-c", PROGRAM]
    done = subprocess.run(
        command, env={**env, **variables}, capture_output=True, text=True, check=True
    )
    return done.stdout.split(), done.stderr


def entries(cache: Path) -> list[Path]:
    return sorted(cache.glob("compiled/*/*-cache"))


def test_the_next_process_finds_what_was_compiled(tmp_path):
    first, second = run(tmp_path)[0], run(tmp_path)[0]
    assert (first[-1], second[-1]) == ("miss", "hit")
    assert first[-2] == second[-2]
    assert entries(tmp_path)


def test_half_an_entry_left_by_a_kill_is_replaced(tmp_path):
    run(tmp_path)
    contents = {entry: entry.read_bytes() for entry in entries(tmp_path)}
    for entry, content in contents.items():
        entry.write_bytes(content[: len(content) // 2])
    lines, errors = run(tmp_path)
    assert lines[-1] == "miss"
    assert "Error reading persistent" not in errors
    assert all(len(entry.read_bytes()) > len(contents[entry]) // 2 for entry in contents)
    assert run(tmp_path)[0][-1] == "hit"


def test_jax_itself_would_keep_half_an_entry(tmp_path):
    """Why entries are checked; where this fails, JAX has mended it."""
    run(tmp_path)
    folder = entries(tmp_path)[0].parent
    for entry in entries(tmp_path):
        entry.write_bytes(entry.read_bytes()[:100])
    for _ in range(2):
        assert run(tmp_path, JAX_COMPILATION_CACHE_DIR=str(folder))[0][-1] == "miss"
    assert {len(entry.read_bytes()) for entry in entries(tmp_path)} == {100}


@pytest.mark.parametrize(
    "variables",
    [{"JAX_ENABLE_COMPILATION_CACHE": "false"}, {"JAX_COMPILATION_CACHE_DIR": ""}],
)
def test_it_can_be_switched_off(tmp_path, variables):
    lines, _ = run(tmp_path, **variables)
    assert lines[0] == "None"
    assert not (tmp_path / "compiled").exists()


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """The folder of the cache, as a process without JAX sees it."""
    monkeypatch.setenv("JAXLORA_CACHE", str(tmp_path))
    for name in ("JAX_COMPILATION_CACHE_DIR", "JAX_ENABLE_COMPILATION_CACHE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.delitem(sys.modules, "jax")
    found = compilation.use_compilation_cache()
    assert found is not None
    assert os.environ["JAX_COMPILATION_CACHE_DIR"] == str(found)
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR")
    return found


def test_only_its_owner_can_put_programs_there(folder):
    assert folder.stat().st_mode & 0o077 == 0
    folder.chmod(0o777)
    assert compilation.use_compilation_cache() is None


def test_a_folder_that_cannot_be_made_is_done_without(folder, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("JAXLORA_CACHE", str(tmp_path / "file"))
    assert compilation.use_compilation_cache() is None


def test_what_was_used_longest_ago_goes_first(folder, monkeypatch):
    import zlib

    content = zlib.compress(os.urandom(1000))
    monkeypatch.setattr(compilation, "_LARGEST_BYTES", 2 * len(content) + 10)
    for age, name in enumerate(("c", "b", "a")):
        entry = folder / f"{name}-cache"
        entry.write_bytes(content)
        when = time.time() - 1000 * (3 - age)
        os.utime(entry, (when, when))
    compilation.use_compilation_cache()
    assert {entry.name for entry in folder.glob("*-cache")} == {"a-cache", "b-cache"}


def test_commands_that_compile_nothing_make_no_cache(tmp_path):
    env = {name: value for name, value in os.environ.items() if "COMPILATION_CACHE" not in name}
    env |= {"JAXLORA_CACHE": str(tmp_path / "cache")}
    command = [sys.executable, "-m", "jaxlora.cli"]
    for words, makes in ((["config", "schema"], False), (["generate", "no/such/x/y", "z"], True)):
        subprocess.run([*command, *words], env=env, capture_output=True, check=False)
        assert (tmp_path / "cache").exists() is makes


def test_a_process_that_has_jax_already_is_left_alone(monkeypatch):
    import jax  # noqa: F401

    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
    assert compilation.use_compilation_cache() is None
    assert "JAX_COMPILATION_CACHE_DIR" not in os.environ

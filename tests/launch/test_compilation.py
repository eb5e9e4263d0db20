"""Programs on disk: kept and found again by another process, where and unless told otherwise."""

import os
import pathlib
import subprocess
import sys

from launch import compilation

CODE = """
import sys
import jax
from launch import compilation

hits = []
jax.monitoring.register_event_listener(
    lambda event, **_: hits.append(event) if event == "/jax/compilation_cache/cache_hits" else None
)
compilation.use_cache("--no-compilation-cache" not in sys.argv)
jax.jit(lambda x: x * 3 + 1)(2.0).block_until_ready()
print(len(hits))
"""


def hits(home: pathlib.Path, *arguments: str, **environment: str) -> int:
    """Programs that another process has found on disk."""
    kept = {name: x for name, x in os.environ.items() if name != "JAX_ENABLE_COMPILATION_CACHE"}
    process = subprocess.run(
        [sys.executable, "-c", CODE, *arguments],
        env=kept | {"XDG_CACHE_HOME": str(home)} | environment,
        check=True,
        capture_output=True,
        text=True,
    )
    return int(process.stdout)


def test_a_second_process_compiles_nothing(tmp_path, monkeypatch):
    home = tmp_path / "home"
    assert hits(home) == 0
    monkeypatch.setenv("XDG_CACHE_HOME", str(home))
    assert any(compilation.default_folder().iterdir())
    assert hits(home) >= 1
    assert hits(home, "--no-compilation-cache") == 0


def test_variables_come_first(tmp_path):
    home, folder = tmp_path / "home", tmp_path / "elsewhere"
    assert hits(home, JAX_COMPILATION_CACHE_DIR=str(folder)) == 0
    assert any(folder.iterdir()) and not home.exists()
    assert hits(home, JAX_ENABLE_COMPILATION_CACHE="false") == 0 and not home.exists()


def test_no_place_to_write_to_is_no_error(tmp_path):
    (tmp_path / "home").write_text("a file")
    assert hits(tmp_path / "home") == 0

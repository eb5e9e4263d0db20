"""Programs on disk: kept and found again by another process, where and unless told otherwise."""

import os
import pathlib
import subprocess
import sys
import types

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
    (program, *_) = compilation.default_folder().glob("*-cache")
    used = program.with_name(program.name.replace("-cache", "-atime"))
    assert len(used.read_bytes()) == 8, "JAX keeps when it was used, for the limit"
    used.unlink()  # as if it was killed before
    assert hits(home) >= 1
    assert hits(home, "--no-compilation-cache") == 0


def test_the_folder_is_limited(tmp_path, monkeypatch):
    """What was used longest ago goes, also where nobody knows when that was."""
    home, limit = tmp_path / "home", {"JAX_COMPILATION_CACHE_MAX_SIZE": "100000"}
    hits(home, **limit)
    monkeypatch.setenv("XDG_CACHE_HOME", str(home))
    (old := compilation.default_folder() / "old-cache").write_bytes(bytes(99_999))
    for program in compilation.default_folder().glob("jit*-cache"):
        program.unlink()
    assert hits(home, **limit) == 0 and not old.exists()
    assert any(compilation.default_folder().glob("jit*-cache"))


def test_variables_come_first(tmp_path):
    home, folder = tmp_path / "home", tmp_path / "elsewhere"
    assert hits(home, JAX_COMPILATION_CACHE_DIR=str(folder)) == 0
    assert any(folder.iterdir()) and not home.exists()
    assert hits(home, JAX_ENABLE_COMPILATION_CACHE="false") == 0 and not home.exists()


def test_no_place_to_write_to_is_no_error(tmp_path):
    (tmp_path / "home").write_text("a file")
    assert hits(tmp_path / "home") == 0


def test_no_home_is_no_error(monkeypatch):
    """Of a user whom the system does not know."""

    class Config:
        jax_enable_compilation_cache, jax_compilation_cache_dir = True, None

        def update(self, name, value):
            assert name == compilation.MIN_SECONDS

    def home():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(pathlib.Path, "home", home)
    monkeypatch.setattr(compilation, "jax", types.SimpleNamespace(config=Config()))
    compilation.use_cache()

"""The packages: which may import which, and the names that are public."""

import ast
import dataclasses
import importlib
import inspect
import pathlib
import re
import subprocess
import sys

import pytest

import omniforcing_jax

ROOT = pathlib.Path(__file__).parents[1]
PACKAGES = (
    *("omniforcing_jax", "configs", "checkpoint_converters", "launch", "benchmarks", "pocket"),
    "examples",
)
# What each may import of the others; tests may import everything.
MAY_IMPORT = {
    "omniforcing_jax": set(),
    "configs": {"omniforcing_jax"},
    "checkpoint_converters": {"omniforcing_jax"},
    "launch": {"omniforcing_jax", "configs", "checkpoint_converters"},
    "benchmarks": {"omniforcing_jax", "configs", "checkpoint_converters", "launch"},
    "pocket": {"omniforcing_jax", "configs", "checkpoint_converters", "launch"},
    "examples": {"omniforcing_jax"},
}
# The library's own, top down as docs/architecture.md draws them: each imports its own row and those
# below.
ROWS = (
    {"scaling", "evaluation"},
    {"training", "data"},
    {"serving"},
    {"pipeline", "encoding", "streaming"},
    {"sampling", "text"},
    {"geometry"},
    {"models", "ops"},
    {"distributed", "io", "blocks", "types", "programs", "ranges"},
)
UPWARDS = {"training/metrics.py": {"scaling.devices"}}  # the one table of devices
PUBLIC = {
    "AVGuidance",
    "AVLatents",
    "BlockLayout",
    "CacheConfig",
    "Chunk",
    "ClipGeometry",
    "ClipWriter",
    "Condition",
    "Guidance",
    "MediaEncoder",
    "Pipeline",
    "PipelineConfig",
    "PromptEncoder",
    "RolloutConfig",
    "SampleConfig",
    "SamplingRecipe",
    "Sound",
    "StreamingAudioEncoder",
    "StreamingSession",
    "StreamingVideoEncoder",
    "Transformer",
    "TransformerConfig",
    "block_noise",
    "block_step",
    "compress_image",
    "decode_clip",
    "fit_pixels",
    "load_encoders",
    "load_pipeline",
    "new_cache",
    "prompt_kv",
    "read_clip",
    "read_image",
    "read_sound",
    "read_video",
    "rollout",
    "sample",
}


def imported(tree: ast.AST) -> set[str]:
    """Top-level names that a module imports, by statement, or by `import_module`."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            found.add(node.module)
        elif isinstance(node, ast.Call) and "import_module" in ast.unparse(node.func):
            found |= {
                constant.value
                for constant in ast.walk(node)
                if isinstance(constant, ast.Constant) and isinstance(constant.value, str)
            }
    return {name.split(".")[0] for name in found}


def test_imports_are_found():
    source = "import a.b\nfrom c.d import e\nimportlib.import_module(f'f.{x}')\nfrom . import g"
    assert {"a", "c", "f"} <= imported(ast.parse(source))


@pytest.mark.parametrize("package", PACKAGES)
def test_packages_point_one_way(package):
    others = set(PACKAGES) | {"tests"} - {package}
    forbidden = others - MAY_IMPORT[package] - {package}
    modules = sorted((ROOT / package).rglob("*.py"))
    assert modules
    wrong = {
        str(path.relative_to(ROOT)): sorted(imported(ast.parse(path.read_text())) & forbidden)
        for path in modules
    }
    assert {path: names for path, names in wrong.items() if names} == {}


def library_imports(tree: ast.AST) -> set[str]:
    """Names below `omniforcing_jax` that a module of it imports from, or imports."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("omniforcing_jax"):
            home = node.module.removeprefix("omniforcing_jax").removeprefix(".")
            found |= {home} if home else {alias.name for alias in node.names}
    return found


def test_the_library_points_downwards():
    library = ROOT / "omniforcing_jax"
    row_of = {name: i for i, row in enumerate(ROWS) for name in row}
    assert {path.stem for path in library.iterdir() if path.stem[0] != "_"} == set(row_of)
    wrong = {}
    for path in sorted(library.rglob("*.py")):
        name = str(path.relative_to(library))
        own = row_of.get(name.split("/")[0].removesuffix(".py"), -1)
        up = {
            x for x in library_imports(ast.parse(path.read_text())) if row_of[x.split(".")[0]] < own
        }
        if up != UPWARDS.get(name, set()):
            wrong[name] = sorted(up)
    assert wrong == {}


def test_public_names():
    assert set(omniforcing_jax.__all__) == PUBLIC
    assert set(dir(omniforcing_jax)) >= PUBLIC
    with pytest.raises(AttributeError, match="nothing_like_it"):
        _ = omniforcing_jax.nothing_like_it


@pytest.mark.parametrize("name", sorted(PUBLIC))
def test_public_names_are_documented(name):
    """Each has a home module, and its docstring names every field or parameter."""
    public = getattr(omniforcing_jax, name)
    home = importlib.import_module(public.__module__)
    assert getattr(home, name) is public
    assert public.__module__.startswith("omniforcing_jax.")
    text = inspect.getdoc(public)
    if fields := getattr(public, "_fields", None):  # of a NamedTuple
        names = set(fields)
    elif dataclasses.is_dataclass(public):  # Flax adds the last two to its modules
        names = {x.name for x in dataclasses.fields(public)} - {"parent", "name"}
        checks = public.__module__ == getattr(vars(public).get("__post_init__"), "__module__", None)
        assert "Raises:" in text or not checks
    elif inspect.isclass(public):
        text += inspect.getdoc(public.__init__)
        names = set(inspect.signature(public.__init__).parameters) - {"self"}
        assert "Raises:" in text
    else:
        names = set(inspect.signature(public).parameters)
        assert "Returns:" in text
    assert {name for name in names if not re.search(rf"\b{name}\b", text)} == set()


def test_programs_and_readme_use_the_public_names():
    """What is public is imported from the package itself, wherever users look for examples."""
    wrong = []
    for path in sorted((ROOT / "launch").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith(
                "omniforcing_jax."
            ):
                wrong += [f"{path.name}: {a.name}" for a in node.names if a.name in PUBLIC]
    assert wrong == []
    readme = (ROOT / "README.md").read_text()
    assert "from omniforcing_jax import" in readme


def test_importing_the_package_imports_nothing_else():
    """`import omniforcing_jax` costs nothing until a name is used."""
    code = "import sys, omniforcing_jax; print('jax' in sys.modules, 'av' in sys.modules)"
    found = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert found.stdout.split() == ["False", "False"]


def test_the_package_has_few_modules_of_its_own():
    assert len(list((ROOT / "omniforcing_jax").glob("*.py"))) <= 8

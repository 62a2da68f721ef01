"""The import arrows of the package, read from the sources: who may know whom.

A room is a folder of muse_jax. What stands at its top (train.py, sample.py, ...) is a command, and
may import everything; a room never imports a command.
"""

import ast
import pathlib
import subprocess
import sys

import pytest

PACKAGE = pathlib.Path(__file__).resolve().parent.parent / "muse_jax"

# The longest prefix that fits a module says what of ours it may import.
ARROWS = {
    "specs": (),
    "process": (),
    "models": ("models",),
    "tasks": ("tasks", "models", "sampling", "specs"),
    "training": ("training", "specs"),
    "sampling": ("sampling", "specs"),
    # It alone puts prompts, models and decode loops together.
    "sampling.editing": ("sampling", "data.transforms"),
    "sampling.pipeline": ("sampling", "specs", "models", "text", "training.checkpoint"),
    "sampling.paella": ("sampling", "models"),
    "data": ("data", "text", "specs"),
    "text": ("text", "specs"),
    "evaluation": ("evaluation", "specs", "data.scenes"),
    # The models say which parameters there are to be filled, and in which shapes.
    "interop": ("interop", "models", "specs", "training.trees"),
}
ROOMS = {name.split(".")[0] for name in ARROWS}


def _modules() -> list[str]:
    paths = (path.relative_to(PACKAGE).with_suffix("") for path in PACKAGE.rglob("*.py"))
    return sorted(".".join(path.parts).removesuffix("__init__").removesuffix(".") for path in paths)


def _source(module: str) -> pathlib.Path:
    path = PACKAGE.joinpath(*module.split(".")) if module else PACKAGE
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")


def _imports(module: str) -> set[str]:
    """Everything that a module imports, at its top or inside functions, by full name."""
    source = _source(module)
    package = ["muse_jax", *filter(None, module.split("."))]
    if source.name != "__init__.py":
        package = package[:-1]
    found = set()
    for node in ast.walk(ast.parse(source.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            start = package[: len(package) - node.level + 1] if node.level else []
            origin = ".".join([*start, *filter(None, [node.module])])
            found |= {f"{origin}.{alias.name}" for alias in node.names}
    return found


def _below(name: str, prefix: str) -> bool:
    return name == prefix or name.startswith(prefix + ".")


def _strangers(module: str, allowed: tuple[str, ...]) -> list[str]:
    ours = (name.removeprefix("muse_jax.") for name in _imports(module) if _below(name, "muse_jax"))
    ours = (name for name in ours if name not in ("muse_jax", "__version__"))
    return sorted(name for name in ours if not any(_below(name, prefix) for prefix in allowed))


@pytest.mark.parametrize("module", [m for m in _modules() if m.split(".")[0] in ROOMS])
def test_rooms_import_only_what_they_may_know(module):
    rule = max((name for name in ARROWS if _below(module, name)), key=len)
    strangers = _strangers(module, ARROWS[rule])
    assert not strangers, f"muse_jax.{module} imports {strangers}; it may import {ARROWS[rule] or 'nothing of ours'}"


def test_every_folder_is_a_room_with_arrows():
    folders = {path.name for path in PACKAGE.iterdir() if path.is_dir() and any(path.glob("*.py"))}
    assert folders <= ROOMS, "a new room needs its arrows in this file"


def test_the_reader_of_imports_sees_what_it_should():
    """The arrows are worth what the reading is: late imports and aliases must not hide."""
    assert "muse_jax.specs" in _imports("quickstart") | _imports("train")
    assert _strangers("quickstart", ()), "the quickstart uses other modules of ours, and none was seen"


def test_only_models_define_flax_modules():
    for module in _modules():
        if _below(module, "models"):
            continue
        for node in ast.walk(ast.parse(_source(module).read_text(encoding="utf-8"))):
            bases = [ast.unparse(base) for base in node.bases] if isinstance(node, ast.ClassDef) else []
            assert not {"nn.Module", "linen.Module", "flax.linen.Module"} & set(bases), f"{module}.{node.name}"


def test_ml_collections_stays_outside_the_rooms():
    for module in _modules():
        if module.split(".")[0] in ROOMS - {"specs"}:
            assert not [name for name in _imports(module) if _below(name, "ml_collections")], module


def test_tensorflow_is_loaded_late():
    """Sampling and training start without TensorFlow's many seconds; what needs it loads it then."""
    rooms = [
        "models.muse",
        "models.vqgan",
        "sampling.pipeline",
        "data.loader",
        "text.vocabulary",
        "training.checkpoint",
    ]
    program = "import sys\n" + "".join(f"import muse_jax.{name}\n" for name in rooms)
    program += (
        "print([name for name in ('tensorflow', 'seqio', 'tensorflow_datasets', 'torch') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=False)
    assert done.stdout.strip() == "[]", done.stdout + done.stderr

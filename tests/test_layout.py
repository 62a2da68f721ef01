"""Where every parameter of the paper's configs lives, and how many there are."""

import pathlib
import subprocess
import sys

import pytest

from muse_jax import ahead, parameters, specs

ROOT = pathlib.Path(__file__).resolve().parent.parent
GOLDEN = ROOT / "tests" / "golden"
CONFIGS = [
    "base_3b.py",
    "base_3b.py:precomputed",
    "base_632m.py",
    "superres_512.py",
    "superres_268m.py",
    "vqgan_f16_256.py",
    "vqgan_f8_512.py",
    "decoder_f8_512.py",
    "maskgit_imagenet256.py",
    "maskgit_imagenet512.py",
    "vqgan_imagenet256.py",
    "vqgan_imagenet512.py",
    "paella_f8_256.py",
]
# Of the model itself; Muse names the first three sizes (abstract, section 3.1). MaskGIT's table 1 has 227M with the
# tokenizer's 54M.
SIZES = {
    "base_3b.py": (2.9e9, 3.3e9),
    "base_632m.py": (0.96 * 632e6, 1.04 * 632e6),
    "superres_268m.py": (0.96 * 268e6, 1.04 * 268e6),
    "maskgit_imagenet256.py": (0.96 * 173e6, 1.04 * 173e6),
    "maskgit_imagenet512.py": (0.96 * 173e6, 1.04 * 173e6),
    "paella_f8_256.py": (0.99 * 578e6, 1.01 * 578e6),  # its 573M, token embedding and classifier
}


@pytest.fixture(scope="module", params=CONFIGS)
def config(request):
    return request.param, parameters.program_of(str(ROOT / "configs" / request.param), ahead.V4_POD_CHIPS)


def test_layouts_are_those_that_were_reviewed(config):
    name, program = config
    golden = (GOLDEN / parameters.golden_name(name)).read_text()
    found = parameters.layout(program)
    assert found == golden, "if this is meant: " + parameters.__doc__.split("\n\n")[2].strip()


def test_the_sizes_are_the_papers(config):
    name, program = config
    low, high = SIZES.get(name, (0, float("inf")))
    assert low <= parameters.counts(program)["model"] <= high


@pytest.mark.parametrize("config", ["base.py", "superres.py", "tokenizer_low.py"])
def test_small_configs_are_counted_on_one_chip(config):
    """Their batches are too small for a pod, their tokenizers come with the package, and codes are shapes here."""
    program = parameters.program_of(str(ROOT / "configs/scenes" / config))
    assert program.mesh.size == 1
    assert parameters.counts(program)["model"] > 1000


def test_every_config_has_a_golden_text():
    files = {path.name for path in (ROOT / "configs").glob("*.py")}
    assert files == {name.partition(":")[0] for name in CONFIGS}
    assert {path.name for path in GOLDEN.glob("*.txt")} == {parameters.golden_name(name) for name in CONFIGS}


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ("configs:nope", "there is no config .*configs"),
        ("README.md", "README.md is no config; name a .py file"),
        ("muse_jax/specs.py", "specs.py is no config: it has no get_config"),
        ("configs/base_3b.py:nope", "unknown variant 'nope'; expected '' or 'precomputed'"),
        ("configs/vqgan_f16_256.py:nope", "has no variants; leave out 'nope'"),
    ],
)
def test_what_is_no_config_is_refused_by_its_name(config, said):
    with pytest.raises(specs.SpecError, match=said):
        parameters.program_of(str(ROOT / config))


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["configs"], "configs: there is no config configs."),
        (["--write=nowhere", "configs/base_632m.py"], "can't write to nowhere: there is no such folder."),
    ],
)
def test_the_command_says_so_in_one_line(words, said):
    command = [sys.executable, "-m", "muse_jax.parameters", *words]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 1
    assert done.stderr == f"SpecError: {said}\n"

"""Every config in configs/ is a run that would start, and the stages of a folder fit each other."""

import importlib.util
import pathlib

import pytest

from muse_jax import quickstart, specs
from muse_jax.sampling import folder as pipeline_folder

CONFIGS = pathlib.Path(__file__).resolve().parent.parent / "configs"
FILES = sorted(str(path.relative_to(CONFIGS)) for path in CONFIGS.rglob("*.py") if "get_config" in path.read_text())
CASCADES = ("scenes", "pictures")
VARIANTS = ("", "long", "tiny")


def _load(path: pathlib.Path):
    spec = importlib.util.spec_from_file_location("config_under_test", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _stage(folder: str, stage: str, variant: str) -> specs.Spec:
    where = quickstart.Setup(
        CONFIGS / folder, variant, pathlib.Path("runs/x"), "" if folder == "scenes" else "pictures"
    )
    return specs.from_config(quickstart.stage_config(where, stage))


@pytest.mark.parametrize("file", FILES)
def test_a_config_is_locked_and_says_what_it_is(file):
    module = _load(CONFIGS / file)
    config = module.get_config()
    assert config.is_locked
    with pytest.raises((AttributeError, KeyError)):
        config.train.no_such_key = 1
    assert f"--config=configs/{file}" in module.__doc__, "the docstring has the command that starts the run"


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("folder", CASCADES)
def test_the_stages_of_a_cascade_fit_each_other(folder, variant):
    stages = {stage: _stage(folder, stage, variant) for stage in quickstart.STAGES}
    pipeline_folder.check(stages)
    for tokenizer, predictor in (("tokenizer_low", "base"), ("tokenizer_high", "superres")):
        size = stages[predictor].data.image_size if predictor == "base" else stages["tokenizer_high"].data.image_size
        side = size // stages[tokenizer].model.factor
        assert stages[predictor].model.grid == (side, side), f"{predictor} and {tokenizer} disagree about the tokens"
    assert stages["decoder"].task.trainable == "decoder"
    assert stages["decoder"].data.image_size == stages["tokenizer_high"].data.image_size


@pytest.mark.parametrize("folder", CASCADES)
def test_an_unknown_variant_is_refused(folder):
    with pytest.raises(ValueError, match="hugee"):
        _load(CONFIGS / folder / "base.py").get_config("hugee")


def test_an_installation_without_a_checkout_finds_its_configs(tmp_path, monkeypatch):
    assert quickstart.configs_folder() == CONFIGS
    (tmp_path / "muse_jax" / "configs").mkdir(parents=True)
    monkeypatch.setattr(quickstart, "__file__", str(tmp_path / "muse_jax" / "quickstart.py"))
    assert quickstart.configs_folder() == tmp_path / "muse_jax" / "configs"

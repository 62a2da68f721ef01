"""Every config in configs/ is a run that would start, and the stages of a folder fit each other."""

import dataclasses
import importlib.util
import pathlib
import typing

import pytest
from absl import flags
from ml_collections import config_flags

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


def _check_keys(section, cls):
    """Each key of a spec is there, in the type that makes its flag read what the spec wants."""
    for name, hint in typing.get_type_hints(cls).items():
        if dataclasses.is_dataclass(hint):
            _check_keys(section[name], hint)
        elif isinstance(hint, type):
            assert type(section[name]) is hint, name
        elif typing.get_origin(hint) is tuple:
            assert type(section[name]) is tuple, name
        else:
            assert name in section


@pytest.mark.parametrize("file", FILES)
def test_a_config_has_every_key_and_what_it_leaves_out_is_the_default(file, monkeypatch):
    config = _load(CONFIGS / file).get_config()
    for name, cls in specs.SECTIONS.items():
        _check_keys(config[name], cls)
    for name, table in specs.NAMED.items():
        _check_keys(config[name], table[config[name].name])
    monkeypatch.setattr(specs, "locked", lambda config: config.lock())
    monkeypatch.setattr(specs, "_check_misfits", lambda spec: None)  # paths are to be given
    assert specs.from_config(config) == specs.from_config(_load(CONFIGS / file).get_config())


@pytest.mark.parametrize(
    ("key", "given", "expected"),
    [
        ("data.text_embeddings", "True", True),
        ("data.min_side", "64", 64),
        ("data.max_aspect", "2", 2.0),
        ("data.text_key", "caption", "caption"),
        ("data.sources", "{'a': {'name': 'scenes', 'weight': 1}}", {"a": {"name": "scenes", "weight": 1}}),
        ("model.text.weights", "weights/t5", "weights/t5"),
        ("optimizer.gradient_dtype", "bfloat16", "bfloat16"),
        ("optimizer.overrides", "{'embeddings': {'name': 'adamw'}}", {"embeddings": {"name": "adamw"}}),
        ("mesh.most_bytes", "1.1", 1.1),
        ("train.tpu_options", "{'xla_some': True}", {"xla_some": True}),
        ("deadlines.step", "300", 300.0),
        ("profile.num_steps", "2", 2),
        ("frozen_rules", "{'embed': None}", {"embed": None}),
    ],
)
@pytest.mark.parametrize("file", ["base_3b.py", "pictures/base.py", "scenes/base.py"])
@pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")  # ml_collections'
def test_flags_set_what_a_config_leaves_out(file, key, given, expected):
    argv = ["train", f"--config={CONFIGS / file}", f"--config.{key}={given}"]
    values = flags.FlagValues()
    found = config_flags.DEFINE_config_file("config", flag_values=values, sys_argv=argv)
    values(argv)
    value = found.value.to_dict()
    for part in key.split("."):
        value = value[part]
    assert value == expected
    assert type(value) is type(expected)


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

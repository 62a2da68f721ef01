"""The settings files as they are shipped: their flags connect the config with what is in the bucket."""

import pathlib
import re
import runpy
import subprocess
import tomllib

import jobset
import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent.parent
LAUNCH = ROOT / "launch"


def _gke() -> tuple[str, list[str], str]:
    settings = tomllib.loads((LAUNCH / "gke/settings.toml").read_text())
    return settings["config"], settings["train_args"], jobset.DATA


def _tpu_vm() -> tuple[str, list[str], str]:
    command = f'source {LAUNCH / "tpu_vm/settings.sh"}; printf "%s\\n" "$CONFIG" "${{TRAIN_ARGS[@]}}"'
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=True)
    config, *flags = done.stdout.splitlines()
    return config, flags, re.search(r"^DATA=(.+)$", (LAUNCH / "tpu_vm/on_worker.sh").read_text(), re.MULTILINE)[1]


@pytest.mark.parametrize("read", [_gke, _tpu_vm])
def test_no_path_of_the_config_is_left_to_the_folder_that_it_runs_in(read):
    config, flags, data = read()
    assert config == "configs/base_3b.py"
    values = dict(flag.removeprefix("--config.").split("=") for flag in flags)
    tree = runpy.run_path(str(ROOT / config))["get_config"]().to_dict()
    paths = {"task.tokenizer", "model.text.weights", "data.vocabulary", "data.path"}
    assert paths | {"data.name"} == set(values)
    for name in paths - {"data.path"}:
        assert values[name].startswith("gs://YOUR_BUCKET/")
    assert values["data.path"].startswith(f"{data}/")  # records are read as files
    relative = re.compile(r"(weights|runs|data)/.+")
    found = {name for name, value in _leaves(tree) if isinstance(value, str) and relative.fullmatch(value)}
    assert found == paths


def _leaves(tree, prefix=""):
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value

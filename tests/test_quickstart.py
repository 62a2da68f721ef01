"""The quickstart from the command line, on the configs' tiny variant."""

import json
import pathlib
import shutil
import subprocess
import sys
import time

import pytest
from PIL import Image

from muse_jax import quickstart

STAGES = ("tokenizer_low", "tokenizer_high", "base", "superres", "decoder")


def test_it_leaves_everything_it_names(tiny_quickstart):
    workdir, said = tiny_quickstart
    report = json.loads((workdir / "report.json").read_text(encoding="utf-8"))
    assert set(report["stages"]) == set(STAGES)
    for stage in STAGES:
        assert set(report["stages"][stage]) == {"minutes", "steps", "loss"}
        assert report["stages"][stage]["steps"] > 0
        steps = [path.name for path in (workdir / stage / "checkpoints").iterdir() if path.name.isdigit()]
        assert str(report["stages"][stage]["steps"]) in steps
        assert (workdir / stage / "metrics.jsonl").stat().st_size > 0
    assert all(0 < stage["minutes"] < report["minutes"] for stage in report["stages"].values())
    for name in ("low", "high", "decoder"):
        assert {"psnr", "ssim", "codebook_used", "statements"} <= set(report["tokenizers"][name])
    prompts = report["prompts"]
    assert prompts["count"] > 0
    for key in ("statements", "all_statements", "statements_unguided", "statements_held_out"):
        assert 0 <= prompts[key] <= 1
    for name in ("samples.png", "decoding.png", "curves.png"):
        with Image.open(workdir / name) as picture:
            assert min(picture.size) > 100
        assert f"runs/quickstart/{name}" in said
    assert "python -m muse_jax.sample --pipeline=runs/quickstart/pipeline" in said, "it names the next command to try"
    manifest = json.loads((workdir / "pipeline" / "pipeline.json").read_text(encoding="utf-8"))["manifest"]
    assert manifest["figures"]["prompts"]["count"] == prompts["count"]
    assert "--variant=tiny" in manifest["command"]
    assert set(manifest) >= {"command", "seed", "versions", "figures"}


def test_started_again_it_has_nothing_to_do(tiny_quickstart):
    workdir, said = tiny_quickstart
    before = (workdir / "report.json").read_text(encoding="utf-8")
    again = _run("runs/quickstart", cwd=workdir.parent.parent)
    assert again.returncode == 0, again.stderr
    assert again.stdout.count("was finished") == len(STAGES)
    assert (workdir / "report.json").read_text(encoding="utf-8") == before
    assert again.stdout.splitlines()[-1] == said.splitlines()[-1]


def test_a_stage_that_cannot_be_trained_ends_all(tmp_path):
    """And says which; what the stage says of it stands above."""
    configs = tmp_path / "configs"
    shutil.copytree(quickstart.configs_folder() / "scenes", configs)
    config = configs / "tokenizer_low.py"
    config.write_text(config.read_text(encoding="utf-8").replace('name="scenes"', 'name="folder", path="nowhere"'))
    done = _run(tmp_path / "run", f"--configs={configs}")
    assert done.returncode == 1
    assert "nowhere" in done.stderr
    assert "tokenizer_low ended with exit code 1: python -m muse_jax.train --config=" in done.stderr


def test_the_order_of_training(monkeypatch):
    """No stage is trained before those that it reads, on one core or an accelerator, or in lanes on several."""
    for cores in ([3], [0, 1]):
        monkeypatch.setattr(quickstart.lanes, "cores", lambda cores=cores: cores)
        groups = quickstart.groups()
        assert max(map(len, groups)) == min(len(cores), 2)
        assert sorted(stage for group in groups for lane in group for stage in lane) == sorted(STAGES)
        there: set[str] = set()
        for group in groups:
            lanes = [list(lane) for lane in group]
            for lane in lanes:
                for place, stage in enumerate(lane):
                    assert set(quickstart.STAGES[stage].values()) <= there | set(lane[:place])
            there |= {stage for lane in lanes for stage in lane}
    monkeypatch.setattr(quickstart.process, "accelerated", lambda environment: True)
    assert quickstart.groups() == [(tuple(STAGES),)]


@pytest.mark.parametrize("number", ["SIGTERM", "SIGKILL"])
@pytest.mark.slow
def test_stopped_anywhere_it_goes_on(tmp_path, number):
    """Stopped again and again, at times that fall into every stage, it ends with the same figures."""
    import signal

    command = [sys.executable, "-m", "muse_jax.quickstart", "--variant=tiny", f"--workdir={tmp_path / 'run'}"]
    for patience in (20, 35, 50, 65, 600):
        child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        try:
            child.communicate(timeout=patience)
        except subprocess.TimeoutExpired:
            child.send_signal(getattr(signal, number))
            said, _ = child.communicate(timeout=120)
            assert child.returncode == (143 if number == "SIGTERM" else -9), said
            if number == "SIGTERM":
                assert "goes on from here" in said
        else:
            break
    assert child.returncode == 0
    report = json.loads((tmp_path / "run" / "report.json").read_text(encoding="utf-8"))
    assert set(report["stages"]) == set(STAGES)


def test_wrong_flags_are_refused_with_the_mend(tmp_path):
    done = _run(tmp_path, "--configs=nowhere")
    assert done.returncode == 1
    assert "nowhere/tokenizer_low.py is not there; --configs must name" in done.stderr
    assert "Traceback" not in done.stderr
    (tmp_path / "file").write_text("")
    done = _run(tmp_path / "file" / "run")
    assert done.returncode == 1
    assert "choose another --workdir" in done.stderr


def test_minutes_add_up_and_survive_a_kill(tmp_path):
    path = tmp_path / "minutes.json"
    program = f"""
import pathlib, time
from muse_jax.quickstart import Minutes
with Minutes(pathlib.Path({str(path)!r}), every=0.1).spent_on("base"):
    print("started", flush=True)
    time.sleep(60)
"""
    child = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE)
    child.stdout.readline()
    time.sleep(1)
    child.kill()
    child.communicate()
    assert 0.5 < json.loads(path.read_text())["base"] * 60 < 3
    minutes = quickstart.Minutes(path)
    before = minutes.parts["base"]
    with minutes.spent_on("base"):
        time.sleep(0.3)
    minutes.add("startup", 6.0)
    with pytest.raises(KeyError), minutes.spent_on("superres"):
        raise KeyError
    assert minutes.parts["base"] - before == pytest.approx(0.3 / 60, rel=0.5)
    assert json.loads(path.read_text()) == minutes.parts
    assert minutes.parts["startup"] == pytest.approx(0.1)
    with minutes.spent_on(quickstart.TRAINING), minutes.spent_on("superres"):
        time.sleep(0.2)
    assert minutes.total() == pytest.approx(0.1 + minutes.parts[quickstart.TRAINING]), "stages are within the training"


@pytest.mark.parametrize("left", ["", '{"startup": 0.1', "[1]", None])
def test_damaged_or_missing_records_do_not_end_a_finished_quickstart(tmp_path, monkeypatch, capsys, left):
    trained = {stage: {"steps": 3, "loss": 0.5} for stage in STAGES}
    monkeypatch.setattr(quickstart, "train_stages", lambda where, minutes: (trained, True))
    monkeypatch.setattr(quickstart, "finish", lambda where, minutes: {"tokenizers": {}, "prompt": "a circle"})
    for name in ("minutes.json", "report.json"):
        if left is not None:
            (tmp_path / name).write_text(left)
    report = quickstart.run(quickstart.Setup(quickstart.configs_folder() / "scenes", "tiny", tmp_path))
    assert json.loads((tmp_path / "report.json").read_text()) == report
    assert {stage["minutes"] for stage in report["stages"].values()} == {None}
    assert "0.5000        ?" in quickstart.summary(report, tmp_path)
    warned = capsys.readouterr().err
    assert [f"{tmp_path / name} is damaged" in warned for name in ("minutes.json", "report.json")] == [
        left is not None
    ] * 2


def _run(workdir: pathlib.Path | str, *flags: str, cwd: pathlib.Path | None = None) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "muse_jax.quickstart", "--variant=tiny", f"--workdir={workdir}", *flags]
    return subprocess.run(command, capture_output=True, text=True, timeout=600, cwd=cwd, check=False)

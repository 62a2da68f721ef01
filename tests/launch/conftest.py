"""The launchers are scripts, no package: their modules are found in their own folder, as when they are run."""

import pathlib
import sys

HERE = pathlib.Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent.parent / "launch" / "gke")]

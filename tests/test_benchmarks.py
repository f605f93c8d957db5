"""The benchmarks run, also without `datasets` and `ml_collections`, and say what is wrong."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
BENCHMARKS = ("latency", "throughput", "ablation", "training_step")
# A machine that has neither package: importing one fails.
WITHOUT_PACKAGES = """
import runpy, sys
for name in ("datasets", "ml_collections"):
    sys.modules[name] = None
sys.argv = [f"benchmarks.{sys.argv[1]}", *sys.argv[2:]]
runpy.run_module(sys.argv[0], run_name="__main__")
"""


def run(name, *arguments):
    command = [sys.executable, "-c", WITHOUT_PACKAGES, name, *arguments]
    environment = {**os.environ, "XLA_FLAGS": "", "JAX_PLATFORMS": "cpu"}
    return subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT)


@pytest.mark.parametrize("name", BENCHMARKS)
def test_leaves_a_table_a_picture_and_every_figure(name, tmp_path):
    few = ["--models=tiny", "--rounds=1", "--budget_minutes=0.01", f"--output={tmp_path}"]
    few += ["--rows=3,20"] if name == "throughput" else []
    done = run(name, *few, "--no-torch")
    assert done.returncode == 0, done.stderr
    content = json.loads((tmp_path / f"{name}.json").read_text())
    assert {"date", "device", "cpus", "jax"} <= set(content["environment"])
    assert content["records"] and all(record["rounds"] == 1 for record in content["records"])
    assert (tmp_path / f"{name}.png").stat().st_size > 1000
    assert "| ---" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["throughput", "--rows=0"], "'0' is not a number above 0"),
        (["throughput", "--models=gpt"], "'gpt' is not one of bert-base"),
        (["throughput", "--drivers=fast"], "'fast' is not one of full, loop, pool, auto"),
        (["throughput", "--checkpoint=nowhere"], "nowhere is not a run directory"),
        (["throughput", "--chunk_tokens=-1", "--models=tiny"], "'-1' is not a number above 0"),
        (["latency", "--budget_minutes=-1"], "'-1' is not a number above 0"),
    ],
)
def test_refuses_what_cannot_be_meant(arguments, message, tmp_path):
    done = run(*arguments, f"--output={tmp_path}")
    assert done.returncode == 2
    assert message in done.stderr and "Traceback" not in done.stderr

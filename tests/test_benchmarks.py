"""The benchmarks run, also without `datasets` and `ml_collections`, and say what is wrong."""

import importlib
import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from benchmarks import command_line
from benchmarks.tpu_compile import collectives
from benchmarks.training_exits import Judge
from helpers import tiny_checkpoint
from pabee_jax.commands.config_file import load_config
from pabee_jax.criteria import MaxProbability
from pabee_jax.data.load import load_task
from pabee_jax.distributed import sharding

SCORES = {"regression_threshold": 0.0}
ROOT = Path(__file__).parents[1]
SLOW = pytest.mark.slow
BENCHMARKS = [
    "training_step",
    *(pytest.param(name, marks=SLOW) for name in ("throughput", "latency", "ablation")),
]
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
    # One device; machine code that is soon compiled, as in conftest.py.
    flags = re.sub(r"--xla_force_host_platform_device_count=\d+", "", os.environ["XLA_FLAGS"])
    environment = {**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
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


@pytest.mark.slow
def test_an_epoch_is_the_sum_of_its_steps(tmp_path):
    config = load_config("configs/demo.py")
    (examples,) = load_task(config).read("train").values()
    demo_rows, batch_size = len(examples.texts), config.batch_size
    few = ["--config=configs/demo.py", "--rounds=1", "--budget_minutes=0.01", "--no-torch"]
    done = run("training_epoch", *few, f"--output={tmp_path}")
    assert done.returncode == 0, done.stderr
    steps = dict(
        (int(tokens), float(milliseconds))
        for tokens, milliseconds in re.findall(r"(\d+) tokens: pabee_jax (\d+) ms", done.stdout)
    )
    for record in json.loads((tmp_path / "training_epoch.json").read_text())["records"]:
        parts = re.findall(r"(\d+) x (\d+)", record["steps by tokens"])
        assert sum(int(count) for count, _ in parts) == math.ceil(demo_rows / batch_size)
        total = sum(int(count) * steps[int(tokens)] for count, tokens in parts) / 1000
        assert record["pabee_jax, s"] == pytest.approx(total, rel=0.1)


@pytest.mark.slow
def test_compile_time(tmp_path):
    few = ["--models=tiny", "--layers=2,8", "--rounds=1", f"--output={tmp_path}"]
    done = run("compile_time", *few)
    assert done.returncode == 0, done.stderr
    records = json.loads((tmp_path / "compile_time.json").read_text())["records"]
    assert [record["layers"] for record in records] == [2, 8]
    assert records[0]["of the first"] == 1
    assert all(record["trace, s"] > 0 and record["compile, s"] > 0 for record in records)


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """An encoder of four layers, and MRPC's files with pairs that are alike or are not."""
    folder = tmp_path_factory.mktemp("sources")
    words = ["red", "green", "blue", "grey"]
    tiny_checkpoint(folder / "model", words, num_hidden_layers=4, max_position_embeddings=64)
    (folder / "MRPC").mkdir()
    random = np.random.default_rng(0)
    for name in ("train", "dev"):
        lines = ["Quality\t#1 ID\t#2 ID\t#1 String\t#2 String"]
        for row in range(40):
            first, second = random.choice(words, 2)
            lines.append(f"{int(first == second)}\t{row}\t{row}\t{first}\t{second}")
        (folder / "MRPC" / f"{name}.tsv").write_text("\n".join(lines) + "\n")
    return [f"--model={folder / 'model'}", f"--data_dir={folder}", "--no-torch"]


@pytest.mark.slow
def test_recipes_are_trained_once_and_judged_again(sources, tmp_path):
    few = ["--recipes=ordinary,mean+per_exit", "--tasks=mrpc", "--seeds=0", "--steps=2"]
    few.append(f"--output={tmp_path}")
    done = run("training_exits", *sources, *few)
    assert done.returncode == 0, done.stderr
    content = json.loads((tmp_path / "training_exits.json").read_text())
    assert [record["recipe"] for record in content["records"]] == ["ordinary", "mean+per_exit"]
    said = re.findall(r"dev accuracy ([\d.]+) at the last exit", done.stderr + done.stdout)
    for record, accuracy in zip(content["records"], said, strict=True):
        assert record["exits"][-1]["accuracy"] == pytest.approx(float(accuracy), abs=1e-4)
        assert len(record["exits"]) == 4
        assert all(record[f"saving {share}"]["layers saved"] >= share for share in (0.25, 0.5))
    # Nothing is missing now, so neither the model nor the data is needed.
    again = run("training_exits", *few, "--no-torch")
    assert again.returncode == 0, again.stderr
    assert json.loads((tmp_path / "training_exits.json").read_text()) == content
    assert "| mean+per_exit |" in again.stdout
    more = run("training_exits", *few, "--seeds=0,1", "--no-torch")
    assert more.returncode == 2 and "2 runs are missing" in more.stderr
    timed = run("training_exits", *few, "--time", "--recipes=ordinary,two_stage", "--no-torch")
    assert timed.returncode == 0, timed.stderr
    seconds = json.loads((tmp_path / "training_exits.json").read_text())["step seconds"]
    assert seconds.keys() == {"ordinary", "two_stage"} and min(seconds.values()) > 0
    other = run("training_exits", *few, "--steps=3", *sources)
    assert other.returncode == 2 and "holds runs with --steps 2, not 3" in other.stderr


@pytest.mark.slow
def test_gradients_of_the_exits(sources, tmp_path):
    few = ["--task=mrpc", "--recipes=pabee", "--steps=3", "--every=2", f"--output={tmp_path}"]
    done = run("gradient_conflict", *sources, *few)
    assert done.returncode == 0, done.stderr
    (record,) = json.loads((tmp_path / "gradient_conflict.json").read_text())["records"]
    assert record["step"] == [0, 2]
    cosine = np.array(record["cosine"])
    assert cosine.shape == (2, 4, 4)
    np.testing.assert_allclose(np.diagonal(cosine, axis1=1, axis2=2), 1, rtol=1e-5)
    assert (tmp_path / "gradient_conflict.png").stat().st_size > 1000


def test_what_a_recipe_is_worth_at_a_saving():
    # Six exits; row 0 is always right, row 1 from exit 3 on, rows 2 and 3 from exit 5 on.
    right_from = np.array([1, 3, 5, 5])
    right = np.arange(1, 7)[:, None] >= right_from
    logits = np.stack([0 * right, np.where(right, 3.0, -1.0)], axis=2).astype(np.float32)
    labels = np.ones(4, np.int32)
    record = Judge("sst2", logits, labels).record()
    assert [exit["accuracy"] for exit in record["exits"]] == [0.25, 0.25, 0.5, 0.5, 1.0, 1.0]
    # Patience 3: row 0 leaves at 4, row 1 at 6, rows 2 and 3 at 4, still wrong. 6 of 24 layers.
    quarter = record["saving 0.25"]
    assert quarter["criterion"] == {"criterion": "patience", "patience": 3} | SCORES
    assert (quarter["layers saved"], quarter["accuracy"]) == (0.25, 0.5)
    # Patience 2 saves 10 of 24 and patience 1, where all leave at layer 2, 16. A threshold between
    # the two confidences (0.73 when wrong, 0.95) saves 10; one below both 20, which is more yet.
    half = record["saving 0.5"]
    assert half["criterion"] == {"criterion": "patience", "patience": 1} | SCORES
    assert (half["layers saved"], half["accuracy"]) == (pytest.approx(16 / 24), 0.25)
    # Row 0 is sure enough at layer 1, row 1 at layer 3, the others at layer 5.
    sure = Judge("sst2", logits, labels).point(MaxProbability(0.8))
    assert (sure["layers saved"], sure["accuracy"]) == (pytest.approx(10 / 24), 1.0)


def test_what_scores_are_worth_at_a_saving():
    # Exit 4 moves every score by 1, exits 5 and 6 by less: patience 3 can save a quarter only
    # where that 1 counts as agreement.
    labels = np.array([1.0, 2.0, 3.0, 4.5], np.float32)
    offsets = np.array([-1.0, -1.0, -1.0, 0.0, 0.25, 0.5], np.float32)
    logits = (labels + offsets[:, None] * np.array([1, 1, 1, 1]))[..., None]
    setting = Judge("stsb", logits.astype(np.float32), labels).setting_that_saves(0.25)
    assert setting.patience == 3 and setting.regression_threshold > 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["throughput", "--rows=0"], "'0' is not a number above 0"),
        (["throughput", "--models=gpt"], "'gpt' is not one of bert-base"),
        (["throughput", "--drivers=fast"], "'fast' is not one of full, loop, pool, auto"),
        (["throughput", "--checkpoint=nowhere"], "nowhere is not a run directory"),
        (["throughput", "--chunk_tokens=-1", "--models=tiny"], "'-1' is not a number above 0"),
        (["training_exits", "--recipes=magic"], "'magic' is not one of ordinary"),
        (["training_exits"], "runs are missing in"),
        (["gradient_conflict"], "--model and --data_dir are needed"),
        (["latency", "--budget_minutes=-1"], "'-1' is not a number above 0"),
    ],
)
def test_refuses_what_cannot_be_meant(arguments, message, tmp_path, monkeypatch, capsys):
    name, *others = arguments
    program = importlib.import_module(f"benchmarks.{name}")
    monkeypatch.setattr(sys, "argv", [name, *others, f"--output={tmp_path}"])
    with pytest.raises(SystemExit) as stopped:
        command_line.run(program.main, program.arguments())
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


def test_collectives_are_found_with_their_sizes_and_loops():
    """In a program whose collectives are known: one outside a loop, one in its body."""
    mesh = sharding.make_mesh(8)

    def on_each_device(x):
        total = jax.lax.psum(x, sharding.DATA)  # (4, 32) float32

        def body(carry, _):
            return carry + jax.lax.pmax(carry[:2] * total[:2], sharding.DATA).sum(), None

        return total, jax.lax.scan(body, x, length=5)[0]

    split, same = PartitionSpec(sharding.DATA), PartitionSpec()
    program = jax.jit(
        jax.shard_map(on_each_device, mesh=mesh, in_specs=split, out_specs=(same, split))
    )
    found = collectives(program.lower(jnp.ones((32, 32))).compile().as_text())
    assert found == [("all-reduce", 4 * 32 * 4, False), ("all-reduce", 2 * 32 * 4, True)]
    assert collectives(jax.jit(jnp.sin).lower(1.0).compile().as_text()) == []

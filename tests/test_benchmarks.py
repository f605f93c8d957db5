"""The benchmarks run without `datasets` and `ml_collections`, and refuse unusable arguments."""

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

from benchmarks import command_line, demo, device_compile
from benchmarks.evidence import points, tables
from benchmarks.evidence.runs import Run
from benchmarks.recipes import RECOMMENDED
from benchmarks.training_exits import DevEvaluation
from helpers import tiny_checkpoint
from pabee_jax.analysis.selection import halves
from pabee_jax.commands.config_file import load_config
from pabee_jax.criteria import Consistency, MaxProbability, from_config
from pabee_jax.data.load import load_task
from pabee_jax.distributed import sharding

SCORES = {"regression_threshold": 0.0}
ROOT = Path(__file__).parents[1]
SLOW = pytest.mark.slow
BENCHMARKS = [
    pytest.param(name, marks=SLOW)
    for name in ("training_step", "throughput", "latency", "ablation")
]
# Simulates a machine that has neither package: importing them fails.
WITHOUT_PACKAGES = """
import runpy, sys
for name in ("datasets", "ml_collections"):
    sys.modules[name] = None
sys.argv = [f"benchmarks.{sys.argv[1]}", *sys.argv[2:]]
runpy.run_module(sys.argv[0], run_name="__main__")
"""


def run(name, *arguments):
    command = [sys.executable, "-c", WITHOUT_PACKAGES, name, *arguments]
    # One device; the other flags of conftest.py, which shorten compilation, stay.
    flags = re.sub(r"--xla_force_host_platform_device_count=\d+", "", os.environ["XLA_FLAGS"])
    environment = {**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    return subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT)


@pytest.mark.parametrize("name", BENCHMARKS)
def test_a_benchmark_writes_a_table_a_figure_and_json_records(name, tmp_path):
    arguments = ["--model=tiny", "--rounds=1", "--budget_minutes=0.01", f"--output={tmp_path}"]
    arguments += ["--rows=3,20"] if name == "throughput" else []
    process = run(name, *arguments, "--no-torch")
    assert process.returncode == 0, process.stderr
    content = json.loads((tmp_path / f"{name}.json").read_text())
    assert {"date", "device", "cpus", "jax"} <= set(content["environment"])
    assert content["records"] and all(record["rounds"] == 1 for record in content["records"])
    assert (tmp_path / f"{name}.png").stat().st_size > 1000
    assert "| ---" in process.stdout


@pytest.mark.slow
def test_the_time_of_an_epoch_is_the_sum_over_its_steps(tmp_path):
    config = load_config("demo")
    (examples,) = load_task(config).read("train").values()
    demo_rows, batch_size = len(examples.texts), config.batch_size
    arguments = ["--config=demo", "--rounds=1", "--budget_minutes=0.01", "--no-torch"]
    process = run("training_epoch", *arguments, f"--output={tmp_path}")
    assert process.returncode == 0, process.stderr
    step_milliseconds = dict(
        (int(tokens), float(milliseconds))
        for tokens, milliseconds in re.findall(r"(\d+) tokens: pabee_jax (\d+) ms", process.stdout)
    )
    for record in json.loads((tmp_path / "training_epoch.json").read_text())["records"]:
        parts = re.findall(r"(\d+) x (\d+)", record["steps by tokens"])
        assert sum(int(count) for count, _ in parts) == math.ceil(demo_rows / batch_size)
        milliseconds = sum(int(count) * step_milliseconds[int(tokens)] for count, tokens in parts)
        assert record["pabee_jax, s"] == pytest.approx(milliseconds / 1000, rel=0.1)


@pytest.mark.slow
def test_compile_time_has_a_record_per_depth(tmp_path):
    arguments = ["--model=tiny", "--layers=2,8", "--rounds=1", f"--output={tmp_path}"]
    process = run("compile_time", *arguments)
    assert process.returncode == 0, process.stderr
    records = json.loads((tmp_path / "compile_time.json").read_text())["records"]
    assert [record["layers"] for record in records] == [2, 8]
    assert records[0]["of the first"] == 1
    assert all(record["trace, s"] > 0 and record["compile, s"] > 0 for record in records)
    process = run("compile_time", *arguments[:1], *arguments[2:], "--programs=loop,pool,few")
    assert process.returncode == 0, process.stderr
    records = json.loads((tmp_path / "compile_time.json").read_text())["records"]
    names = ["loop cls", "loop mean", "pool cls", "pool mean", "few cls", "few mean"]
    assert [record["program"] for record in records] == names


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """Return arguments: a four-layer encoder, and MRPC files of pairs of equal or other words."""
    folder = tmp_path_factory.mktemp("sources")
    words = ["red", "green", "blue", "grey"]
    tiny_checkpoint(folder / "model", words, num_hidden_layers=4, max_position_embeddings=64)
    (folder / "MRPC").mkdir()
    random = np.random.default_rng(0)
    for name in ("train", "dev"):
        lines = ["Quality\t#1 ID\t#2 ID\t#1 String\t#2 String"]
        for row in range(80):
            first, second = random.choice(words, 2)
            lines.append(f"{int(first == second)}\t{row}\t{row}\t{first}\t{second}")
        (folder / "MRPC" / f"{name}.tsv").write_text("\n".join(lines) + "\n")
    return [f"--model={folder / 'model'}", f"--data_dir={folder}"]


@pytest.mark.slow
def test_training_exits_trains_only_the_missing_runs(sources, tmp_path):
    output = ["--steps=2", f"--output={tmp_path}"]
    arguments = ["--recipes=ordinary,mean+per_exit", "--task=mrpc", "--seeds=0", *output]
    process = run("training_exits", *sources, *arguments)
    assert process.returncode == 0, process.stderr
    content = json.loads((tmp_path / "training_exits.json").read_text())
    assert [record["recipe"] for record in content["records"]] == ["ordinary", "mean+per_exit"]
    accuracies = re.findall(
        r"dev accuracy ([\d.]+) at the last exit", process.stderr + process.stdout
    )
    for record, accuracy in zip(content["records"], accuracies, strict=True):
        assert record["exits"][-1]["accuracy"] == pytest.approx(float(accuracy), abs=1e-4)
        assert len(record["exits"]) == 4
        assert all(record[f"saving {share}"]["layers saved"] >= share for share in (0.25, 0.5))
    # No run is missing now, so that neither the model nor the data is needed.
    again = run("training_exits", *arguments)
    assert again.returncode == 0, again.stderr
    assert json.loads((tmp_path / "training_exits.json").read_text()) == content
    assert "| mean+per_exit |" in again.stdout
    more = run("training_exits", *arguments, "--seeds=0,1")
    assert more.returncode == 2 and "2 runs are missing" in more.stderr
    timed = run("training_exits", *output, "--time", "--recipes=ordinary,two_stage")
    assert timed.returncode == 0, timed.stderr
    seconds = json.loads((tmp_path / "training_exits.json").read_text())["step seconds"]
    assert seconds.keys() == {"ordinary", "two_stage"} and min(seconds.values()) > 0
    other = run("training_exits", *arguments, "--steps=3", *sources)
    assert other.returncode == 2 and "holds runs with --steps 2, not 3" in other.stderr


@pytest.mark.slow
def test_gradient_conflict_records_the_exits_gradients(sources, tmp_path):
    arguments = ["--task=mrpc", "--recipes=pabee", "--steps=3", "--every=2"]
    process = run("gradient_conflict", *sources, *arguments, f"--output={tmp_path}")
    assert process.returncode == 0, process.stderr
    (record,) = json.loads((tmp_path / "gradient_conflict.json").read_text())["records"]
    assert record["step"] == [0, 2]
    cosine = np.array(record["cosine"])
    assert cosine.shape == (2, 4, 4)
    np.testing.assert_allclose(np.diagonal(cosine, axis1=1, axis2=2), 1, rtol=1e-5)
    assert (tmp_path / "gradient_conflict.png").stat().st_size > 1000


def test_the_setting_of_a_saving_is_the_slowest_that_reaches_it():
    # Six exits. Row 0 is correct at every exit, row 1 from exit 3 on, rows 2 and 3 from exit 5 on.
    first_correct_exit = np.array([1, 3, 5, 5])
    correct = np.arange(1, 7)[:, None] >= first_correct_exit
    logits = np.stack([0 * correct, np.where(correct, 3.0, -1.0)], axis=2).astype(np.float32)
    labels = np.ones(4, np.int32)
    record = DevEvaluation("sst2", logits, labels).record()
    assert [exit["accuracy"] for exit in record["exits"]] == [0.25, 0.25, 0.5, 0.5, 1.0, 1.0]
    # With patience 3, row 0 exits at layer 4, row 1 at 6, and rows 2 and 3 at 4 with wrong answers.
    # That saves 6 of 24 layers.
    quarter = record["saving 0.25"]
    assert quarter["criterion"] == {"criterion": "patience", "patience": 3} | SCORES
    assert (quarter["layers saved"], quarter["accuracy"]) == (0.25, 0.5)
    # Patience 2 saves 10 of 24 layers; patience 1, with which all rows exit at layer 2, saves 16.
    # A threshold between the two confidences (0.73 if wrong, 0.95 if correct) saves 10. A threshold
    # below both saves 20, which is more than patience 1 saves.
    half = record["saving 0.5"]
    assert half["criterion"] == {"criterion": "patience", "patience": 1} | SCORES
    assert (half["layers saved"], half["accuracy"]) == (pytest.approx(16 / 24), 0.25)
    # Row 0 reaches the threshold at layer 1, row 1 at layer 3, rows 2 and 3 at layer 5.
    point = DevEvaluation("sst2", logits, labels).operating_point(MaxProbability(0.8))
    assert (point["layers saved"], point["accuracy"]) == (pytest.approx(10 / 24), 1.0)


def test_the_setting_of_a_saving_for_scores_has_the_threshold_that_reaches_it():
    # Exit 4 changes every score by 1, exits 5 and 6 by less: patience 3 saves a quarter of the
    # layers only if the threshold accepts a change of 1.
    labels = np.array([1.0, 2.0, 3.0, 4.5], np.float32)
    offsets = np.array([-1.0, -1.0, -1.0, 0.0, 0.25, 0.5], np.float32)
    logits = (labels + offsets[:, None] * np.array([1, 1, 1, 1]))[..., None]
    setting = DevEvaluation("stsb", logits.astype(np.float32), labels).setting_that_saves(0.25)
    assert setting.patience == 3 and setting.regression_threshold > 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["throughput", "--rows=0"], "'0' is not a positive number"),
        (["throughput", "--model=gpt"], "'gpt' is not one of bert-base"),
        (["throughput", "--driver=fast"], "'fast' is not one of full, loop, pool, auto"),
        (["throughput", "--checkpoint=nowhere"], "nowhere is not a run directory"),
        (["throughput", "--chunk_tokens=-1", "--model=tiny"], "'-1' is not a positive number"),
        (["throughput", "--checkpoint=run", "--rows=8"], "--rows has no effect with --checkpoint"),
        (["throughput", "--patience=4"], "--patience has no effect without --checkpoint"),
        (["ablation", "--checkpoint=run", "--model=tiny"], "--model has no effect with"),
        (["training_exits", "--recipes=magic"], "'magic' is not one of ordinary"),
        (["training_exits"], "runs are missing in"),
        (["training_exits", "--time", "--task=mrpc"], "--task has no effect with --time"),
        (["gradient_conflict"], "--model or --data_dir is missing"),
        (["latency", "--budget_minutes=-1"], "'-1' is not a positive number"),
        (["latency", "--model=tiny", "--sequence_length=32,513"], "more than the 512 positions"),
    ],
)
def test_a_benchmark_refuses_unusable_arguments(arguments, message, tmp_path, monkeypatch, capsys):
    name, *others = arguments
    program = importlib.import_module(f"benchmarks.{name}")
    monkeypatch.setattr(sys, "argv", [name, *others, f"--output={tmp_path}"])
    with pytest.raises(SystemExit) as stopped:
        command_line.run(program.main, program.make_parser())
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


def test_device_compile_refuses_an_option_of_a_program_that_is_not_compiled(
    tmp_path, monkeypatch, capsys
):
    arguments = ["--topology=v5e:2x4", "--batch_size=256", "--programs=loop", "--rematerialize"]
    monkeypatch.setattr(sys, "argv", ["device_compile", *arguments, f"--output={tmp_path}"])
    with pytest.raises(SystemExit) as stopped:
        command_line.run(device_compile.main, device_compile.make_parser())
    assert stopped.value.code == 2
    assert "--rematerialize has no effect without --programs train" in capsys.readouterr().err


def test_collectives_are_listed_with_their_sizes_and_loops():
    """The program has two known collectives: the first outside a loop, the second in its body."""
    mesh = sharding.make_mesh(8)

    def on_each_device(x):
        total = jax.lax.psum(x, sharding.DATA)  # (4, 32) float32

        def body(carry, _):
            return carry + jax.lax.pmax(carry[:2] * total[:2], sharding.DATA).sum(), None

        return total, jax.lax.scan(body, x, length=5)[0]

    split, replicated = PartitionSpec(sharding.DATA), PartitionSpec()
    program = jax.jit(
        jax.shard_map(on_each_device, mesh=mesh, in_specs=split, out_specs=(replicated, split))
    )
    text = program.lower(jnp.ones((32, 32))).compile().as_text()
    expected = [("all-reduce", 4 * 32 * 4, False), ("all-reduce", 2 * 32 * 4, True)]
    assert device_compile.collectives(text) == expected
    assert device_compile.collectives(jax.jit(jnp.sin).lower(1.0).compile().as_text()) == []


def test_the_demos_tables_in_the_docs_are_those_of_the_raw_results():
    root = Path(demo.__file__).parents[1]
    records = json.loads((root / "docs" / "data" / "demo.json").read_text())["records"]
    assert demo.tables(records) in (root / "docs" / "results-demo.md").read_text()


def evidence_logits(classes=2, exits=6, rows=200):
    random = np.random.default_rng(0)
    labels = random.integers(0, 2, rows)
    logits = random.normal(size=(exits, rows, classes)).astype(np.float32)
    if classes == 1:
        labels = random.uniform(0, 5, rows).astype(np.float32)
        return labels[:, None] + logits / np.arange(1, exits + 1)[:, None, None], labels
    logits += np.arange(exits)[:, None, None] * np.eye(2, dtype=np.float32)[labels]
    return logits, labels


@pytest.mark.parametrize(("task", "classes"), [("sst2", 2), ("stsb", 1)])
def test_the_evidence_chooses_the_slowest_setting_that_is_fast_enough(task, classes):
    logits, labels = evidence_logits(classes)
    record = points.record_of(Run("ordinary", task, 0), logits, labels)
    for speedup, point in record["points"].items():
        assert point["layer speed-up"] > 0.95 * float(speedup)
        assert sum(point["exit layers"]) == len(labels)
        low, high = point["interval"]
        assert low <= point["difference"] <= high
    layers = [point["layer speed-up"] for point in record["points"].values()]
    assert layers == sorted(layers)
    if task == "sst2":  # A threshold can be as slow as the speed-up allows.
        assert all(n < 1.15 * s for n, s in zip(layers, points.SPEEDUPS, strict=True))


def test_the_evidence_shows_no_row_with_a_setting_that_was_chosen_on_it():
    logits, labels = evidence_logits()
    first, _ = halves(len(labels))
    before = points.point_at(2.0, logits, labels, "accuracy").settings
    logits[:, first] = 7 * logits[:, first]
    after = points.point_at(2.0, logits, labels, "accuracy").settings
    assert before[0] == after[0], "the setting of the first half depends on the first half"
    assert before[1] != after[1], "the setting of the second half does not depend on the first"


@pytest.mark.slow
def test_the_headline_shows_ordinary_fine_tuning_beside_the_preset():
    logits, labels = evidence_logits()
    better = logits + 9 * np.eye(2, dtype=np.float32)[labels]
    records = [
        points.record_of(Run("ordinary", "sst2", 0), better, labels),
        points.record_of(Run(RECOMMENDED, "sst2", 0), logits, labels),
        points.record_of(Run(RECOMMENDED, "cola", 0), logits, labels),
    ]
    *_, sst2, cola = tables.headline({"records": records}).splitlines()
    full_depth = f"{100 * (logits[-1].argmax(axis=1) == labels).mean():.1f}"
    assert [cell.strip() for cell in sst2.split("|")][3:5] == ["100.0 (1)", f"{full_depth} (1)"]
    assert [cell.strip() for cell in cola.split("|")][3] == ""


def test_the_tables_of_the_evidence_have_a_line_per_recipe_and_the_measured_speedup():
    logits, labels = evidence_logits()
    record = points.record_of(Run("ordinary", "sst2", 3), logits, labels)
    seconds = {"full depth": 6.0}
    seconds |= {f"{speedup:g}": 3.0 for speedup in points.SPEEDUPS}
    times = {"recipe": "ordinary", "task": "sst2", "seed": 3, "pool": seconds, "loop": seconds}
    content = {"records": [record], "times": {"": times}}
    *_, line = tables.of_recipes(content).splitlines()
    assert line.count("2.00x pool, 2.00x loop") == len(points.SPEEDUPS)
    accuracy = float((logits[-1].argmax(axis=1) == labels).mean())
    assert f"{100 * accuracy:.1f} (1)" in [cell.strip() for cell in line.split("|")]
    settings = record["points"]["2"]["settings"]
    assert all(isinstance(from_config(values), Consistency) for values in settings)

"""The pages for users run from top to bottom, commands and Python, as a reader runs them.

Three things differ from what a reader does. The encoders are tiny, GLUE comes from small files
instead of the hub, and a training run has few steps: `pabee-jax train` gets further arguments.
What a page installs is already installed.
"""

import ast
import asyncio
import csv
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import numpy as np
import pytest

from helpers import FILM_WORDS, film_texts, one_device_environment, tiny_checkpoint, tiny_classifier

ROOT = Path(__file__).parent.parent
# What a reader has before the page begins: runs, by their names on this page and in RUNS.
PAGES = {
    "start": {},
    "fine-tune": {},
    "own-data": {},
    "training-exits": {},
    "criteria": {"mrpc": "mean-0", "sst2": "sst2"},
    "laboratory": {
        "mrpc": "mean-0",
        "sst2": "sst2",
        **{name: name for name in ("paper-0", "paper-1", "mean-0", "mean-1")},
    },
    "encoders": {"mrpc": "paper-0"},
    "python": {"mrpc": "mean-0"},
    "scoring": {"mrpc": "mean-0"},
    "serving": {"mrpc": "mean-0"},
    "extend": {"mrpc": "mean-0"},
    "commands": {
        "a-seed0": "paper-0",
        "a-seed1": "paper-1",
        "b-seed0": "mean-0",
        "b-seed1": "mean-1",
    },
}
RUNS = {
    "paper-0": ("glue:mrpc", 0),
    "paper-1": ("glue:mrpc", 1),
    "mean-0": ("glue:mrpc,recommended", 0),
    "mean-1": ("glue:mrpc,recommended", 1),
    "sst2": ("glue:sst2,recommended", 0),
}
# Not what the page is about, or not on this machine: other packages, other machines, a benchmark.
LEFT_OUT = re.compile(
    r"python3? -m (venv|benchmarks\.)|(\S*/)?pip install|import ray|from ray|textattack"
)
# The program that stands for `pabee-jax`.
PROGRAM = """#!{python}
import sys
from pabee_jax.commands.main import main

arguments = sys.argv[1:]
if arguments[0] == "train":
    values = {{"bert-base-uncased": "MODEL", "albert-base-v2": "ALBERT", "DIR": "MODEL"}}
    arguments = [
        option.removesuffix(value) + values.get(value, value)
        for option in arguments
        for value in [option.rpartition("=")[2]]
    ]
    arguments += ["--config.max_steps=40", "--config.eval_every=40", "--config.batch_size=8"]
    arguments += ["--config.learning_rate=3e-3", "--config.warmup_steps=0"]
    if any(option.startswith(("glue:", "attach:")) for option in arguments):
        arguments += ["--config.data_dir=GLUE"]
main(["pabee-jax", *arguments])
"""


def write_rows(path: Path, names: list[str], rows: list[list], delimiter: str = ",") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        csv.writer(file, delimiter=delimiter).writerows([names, *rows])


def write_glue(folder: Path) -> None:
    """Write small files of MRPC, SST-2 and STS-B, whose labels depend on the words."""
    for part, count in (("train", 160), ("dev", 640)):
        texts = film_texts(count)
        labels = [int(text.startswith("good")) for text in texts]
        pairs = list(zip(labels, range(count), range(count), texts, texts[::-1], strict=True))
        names = ["Quality", "#1 ID", "#2 ID", "#1 String", "#2 String"]
        write_rows(folder / "MRPC" / f"{part}.tsv", names, pairs, "\t")
        rows = list(zip(texts, labels, strict=True))
        write_rows(folder / "SST-2" / f"{part}.tsv", ["sentence", "label"], rows, "\t")
        rows = [[i, "", "", "", "", "", "", *pairs[i][3:], 5 * labels[i]] for i in range(count)]
        names = "index genre filename year old_index source1 source2 sentence1 sentence2 score"
        write_rows(folder / "STS-B" / f"{part}.tsv", names.split(), rows, "\t")


def write_files(folder: Path) -> None:
    """Write the files that the pages name."""
    for name, count in (("train", 160), ("dev", 640), ("new", 20), ("rows", 20)):
        texts = film_texts(count)
        labels = ["yes" if text.startswith("good") else "no" for text in texts]
        names = ["id", "review", "verdict", "stars", "text", "label", "sentence1", "sentence2"]
        rows = [
            [i, text, label, label, text, label, text, texts[-1]]
            for i, (text, label) in enumerate(zip(texts, labels, strict=True))
        ]
        write_rows(folder / f"{name}.csv", names, rows)
    of_advglue = [
        {"idx": 0, "label": 1, "sentence": "go0d film", "original_sentence": "good film"},
        {"idx": 1, "label": 0, "sentence": "b4d film", "original_sentence": "bad film"},
    ]
    (folder / "dev_ann.json").write_text(json.dumps({"sst2": of_advglue}))


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """A folder with the program, encoders, data and the runs that some pages begin with."""
    folder = tmp_path_factory.mktemp("pages")
    shape = {"num_hidden_layers": 6, "max_position_embeddings": 128, "initializer_range": 0.5}
    albert = {"model_type": "albert", "embedding_size": 8, "num_hidden_groups": 1}
    tiny_checkpoint(folder / "MODEL", FILM_WORDS, **shape)
    tiny_checkpoint(folder / "ALBERT", FILM_WORDS, **shape, **albert)
    saved = tiny_classifier(folder / "saved", 2, **shape)
    write_glue(folder / "GLUE")
    write_files(folder)
    program = folder / "bin" / "pabee-jax"
    program.parent.mkdir()
    program.write_text(PROGRAM.format(python=sys.executable))
    program.chmod(0o755)
    environment = environment_of(folder)
    for run, (config, seed) in RUNS.items():
        options = f"--config {config} --config.seed={seed} --config.model=MODEL"
        shell(f"pabee-jax train {options} --workdir runs/{run}", folder, environment)
        shell(f"pabee-jax evaluate --checkpoint runs/{run} --patience 0,1", folder, environment)
    convert = f"pabee-jax convert --checkpoint {saved} --output my-classifier --to plain --exit 5"
    shell(convert, folder, environment)
    return folder


def environment_of(folder: Path) -> dict[str, str]:
    path = f"{folder / 'bin'}{os.pathsep}{Path(sys.executable).parent}{os.pathsep}"
    return one_device_environment() | {"PATH": path + os.environ["PATH"]}


def shell(commands: str, folder: Path, environment: dict[str, str]) -> str:
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", commands],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, f"{commands}\n{done.stdout}\n{done.stderr}"
    return done.stdout


class Reader:
    """Runs the blocks of a page one after the other; a service runs until the page ends."""

    def __init__(self, folder: Path):
        self.folder, self.environment = folder, environment_of(folder)
        self.service: subprocess.Popen | None = None
        # What the pages leave to the reader: texts, and the arrays of an exported program.
        self.names = {"texts": film_texts(9), "ids": np.ones((2, 128), np.int32)}
        self.names["mask"] = self.names["ids"]
        self.names["batch"] = {"input_ids": self.names["ids"]}

    def run(self, language: str, block: str) -> None:
        if language == "bash":
            lines = block.replace(".venv/bin/", "").replace("\\\n", " ").splitlines()
            for line in lines:
                if not LEFT_OUT.match(line):
                    self.command(line)
        elif not LEFT_OUT.search(block):
            self.python(re.sub(r"(?m)^classifier\.push_to_hub.*$", "", block))

    def command(self, line: str) -> None:
        print(f"$ {line}", flush=True)
        if line.startswith("pabee-jax serve"):
            self.stop()
            self.service = subprocess.Popen(
                line.split(), cwd=self.folder, env=self.environment, start_new_session=True
            )
            wait_for("http://127.0.0.1:8000/health")
        else:
            print(shell(line, self.folder, self.environment))

    def python(self, block: str) -> None:
        print(">>> " + block.replace("\n", "\n... "), flush=True)
        if name := re.match(r"# (\w+\.py)$", block.splitlines()[0]):
            (self.folder / name[1]).write_text(block)
        code = compile(block, "the page", "exec", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)
        if (result := eval(code, self.names)) is not None:
            asyncio.run(result)

    def stop(self) -> None:
        if self.service:
            os.killpg(self.service.pid, signal.SIGTERM)
            self.service.wait(60)
            self.service = None


def wait_for(url: str) -> None:
    for _ in range(300):
        try:
            with urllib.request.urlopen(url):
                return
        except OSError:
            time.sleep(0.4)
    raise TimeoutError(url)


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES)
def test_a_page_runs_from_top_to_bottom(page, prepared, tmp_path, monkeypatch, own_criteria):
    folder = tmp_path / "reader"
    shutil.copytree(prepared, folder, ignore=shutil.ignore_patterns("runs"))
    for name, run in PAGES[page].items():
        shutil.copytree(prepared / "runs" / run, folder / "runs" / name)
    monkeypatch.chdir(folder)
    text = (ROOT / "docs" / f"{page}.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```(bash|python)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    assert blocks
    reader = Reader(folder)
    try:
        for language, block in blocks:
            reader.run(language, block)
    finally:
        reader.stop()

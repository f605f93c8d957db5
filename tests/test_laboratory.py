"""evaluate.py's sweeps, calibration and report, and what a person sees of them."""

import csv
import json
import re
import shutil
import subprocess

import numpy as np
import pytest

from evaluated import finished_run, options
from pabee_jax import EarlyExitClassifier, InputError, Patience, replay
from pabee_jax.checkpoints.pretrained import save_criterion
from pabee_jax.commands.evaluate import evaluate
from pabee_jax.commands.risk_control import halves
from pabee_jax.criteria import Entropy, Vote, describe, from_config, parse
from pabee_jax.training import run_directory

ROWS = 400


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return finished_run(tmp_path_factory.mktemp("run"), rows=ROWS)


@pytest.fixture(scope="module")
def studied(run, tmp_path_factory):
    """Everything at once, from one pass."""
    output = tmp_path_factory.mktemp("studied")
    settings = ["entropy:threshold=0.6", "vote:votes=2"]
    chosen = options(run, output=str(output), sweep=True, report=True, criterion=settings)
    evaluate(chosen, None)
    return output


def lines_of(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_the_table_has_settings_of_every_criterion(studied):
    saved = np.load(studied / "all_exit_logits.npz")
    rows = json.loads((studied / "results.json").read_text())["rows"]
    assert [row["criterion"] for row in rows] == ["patience"] * 4 + ["entropy", "vote"]
    for row, criterion in zip(rows[4:], (Entropy(0.6), Vote(2)), strict=True):
        exits, answers = map(np.asarray, replay(criterion, saved["logits"]))
        assert row["mean_exit_layer"] == pytest.approx(exits.mean())
        assert row["accuracy"] == pytest.approx((answers.argmax(1) == saved["labels"]).mean())
    columns = lines_of(studied / "predictions.csv")[0]
    assert {"prediction_vote_votes_2", "exit_layer_entropy_threshold_0.6"} <= set(columns)
    assert {"patience", "threshold", "votes"} <= set(lines_of(studied / "results.csv")[0])


def test_a_sweep_leaves_every_setting_behind(studied):
    saved = np.load(studied / "all_exit_logits.npz")
    content = json.loads((studied / "sweep.json").read_text())
    assert content["accuracy"]["full depth"] == pytest.approx(
        (saved["logits"][-1].argmax(1) == saved["labels"]).mean()
    )
    lines = lines_of(studied / "sweep.csv")
    assert len(lines) == len(content["settings"])
    chosen = [line for line in lines if line["setting"] == "patience 2"]
    exits, answers = map(np.asarray, replay(Patience(2), saved["logits"]))
    assert float(chosen[0]["mean_exit_layer"]) == pytest.approx(exits.mean())
    assert float(chosen[0]["accuracy"]) == pytest.approx(
        (answers.argmax(1) == saved["labels"]).mean()
    )
    assert (studied / "sweep.png").read_bytes().startswith(b"\x89PNG")


def test_the_report_is_one_small_file_that_fetches_nothing(studied):
    page = (studied / "report.html").read_text()
    assert len(page) < 2_000_000
    for title in ("Trade-off", "Where rows leave", "Overthinking", "Hardest rows"):
        assert f"<h2>{title}</h2>" in page
    # Names of XML languages are no addresses to fetch from; everything else would be.
    addresses = re.findall(r'(?:src|href)="([^"#]*)', page) + re.findall(r"url\(([^#)]*)", page)
    assert addresses and all(each.startswith("data:text/csv") for each in addresses if each)
    assert "default-src 'none'" in page and "<img" not in page and "<image" not in page


CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")


@pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium here")
@pytest.mark.parametrize("width", [400, 1400])
def test_the_report_in_a_browser(studied, tmp_path, width):
    """Nothing is wider than the page, and every word in a picture is high enough to be read."""
    script = """<script>
      addEventListener("load", () => {
        const boxes = (of, what) => [...of.querySelectorAll(what)]
          .map(each => each.getBoundingClientRect());
        const wide = boxes(document, "svg, section, li").filter(box => box.right > innerWidth);
        const pictures = document.querySelectorAll("svg");
        const small = [...pictures].flatMap(each => boxes(each, "text"))
          .filter(box => box.height < 8);
        const found = [innerWidth, pictures.length, wide.length, small.length];
        parent.postMessage(found.join(" "), "*");
      });
    </script>"""
    page = (studied / "report.html").read_text()
    page = page.replace("default-src 'none'", "default-src 'none'; script-src 'unsafe-inline'")
    (tmp_path / "page.html").write_text(page.replace("</body>", f"{script}</body>"))
    # A window has a smallest width, above a phone's; a frame has none.
    (tmp_path / "frame.html").write_text(
        "<script>addEventListener('message', said => document.title = said.data)</script>"
        f'<iframe src="page.html" style="width:{width}px; height:900px; border:0"></iframe>'
    )
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--window-size=1500,1000"]
    command += ["--dump-dom", f"--user-data-dir={tmp_path}", f"file://{tmp_path}/frame.html"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    (found,) = re.findall(r"<title>(.*?)</title>", done.stdout)
    seen, pictures, wide, small = map(int, found.split())
    assert abs(seen - width) <= 20 and pictures == 6  # A scroll bar takes some of the width.
    assert (wide, small) == (0, 0)


def test_a_setting_is_stored_with_its_guarantee(run, tmp_path, capsys):
    copy = shutil.copytree(run, tmp_path / "run")
    evaluate(options(copy, calibrate=True, max_drop=0.6, criterion=["entropy"]), None)
    said = capsys.readouterr().out
    kept = json.loads((copy / "config.json").read_text())["early_exit"]
    assert kept["criterion"] == "entropy" and kept["guarantee"]["max_drop"] == 0.6
    classifier = EarlyExitClassifier.from_pretrained(str(copy), driver="full")
    assert classifier.criterion == Entropy(kept["threshold"])
    # What it says of the calibration rows is true of these rows.
    logits = classifier.all_exit_logits([json.loads(line)["text"] for line in dev_lines(run)])
    ours, others = halves(ROWS)
    labels = np.array([0, 1] * (ROWS // 2))
    exits, answers = (np.asarray(each) for each in replay(classifier.criterion, logits[:, ours]))
    right = logits[-1, ours].argmax(1) == labels[ours]
    harmed = int((right & (answers.argmax(1) != labels[ours])).sum())
    guarantee = kept["guarantee"]
    assert (guarantee["harmed"], guarantee["rows"]) == (harmed, ROWS // 2)
    assert guarantee["mean_exit_layer"] == pytest.approx(exits.mean())
    assert f"on the other {len(others)} rows" in said and describe(classifier.criterion) in said


def dev_lines(run):
    return (run.parent / "dev.jsonl").read_text().splitlines()


def test_no_setting_qualifies_and_nothing_changes(run, tmp_path):
    copy = shutil.copytree(run, tmp_path / "run")
    before = (copy / "config.json").read_bytes()
    with pytest.raises(InputError, match="200 calibration rows are too few.*299 rows"):
        evaluate(options(copy, calibrate=True), None)
    assert (copy / "config.json").read_bytes() == before


def test_the_halves_are_fixed_and_share_no_row():
    for rows in (1, 2, 7, 100):
        ours, others = halves(rows)
        assert sorted([*ours, *others]) == list(range(rows))
        assert (len(ours), ours.tolist()) == ((rows + 1) // 2, halves(rows)[0].tolist())


def test_a_kept_setting_survives_the_next_save(run, tmp_path):
    copy = shutil.copytree(run, tmp_path / "run")
    save_criterion(copy, Patience(2), {"max_drop": 0.01})
    EarlyExitClassifier.from_pretrained(str(copy)).save_pretrained(tmp_path / "again")
    assert EarlyExitClassifier.from_pretrained(str(tmp_path / "again")).criterion == Patience(2)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"criterion": ["hunch:x=1"]}, "unknown exit criterion 'hunch'; known are"),
        ({"criterion": ["hunch"], "sweep": True}, "unknown exit criterion 'hunch'"),
        ({"criterion": ["entropy"]}, "give a setting, as in entropy:threshold=0.3"),
        ({"criterion": ["entropy:x=1"]}, "entropy has no 'x'; it has threshold"),
        ({"criterion": ["divergence:patience=1"]}, "lacks threshold=NUMBER"),
        ({"criterion": ["entropy:threshold=high"]}, "'threshold=high' is not FIELD=NUMBER"),
        ({"criterion": ["entropy:threshold=nan"]}, "is not FIELD=NUMBER"),
        ({"criterion": ["entropy:threshold=1.5"]}, "must be a number from 0 to 1, not 1.5"),
        ({"criterion": ["vote:votes=1.5"]}, "votes must be a whole number"),
        ({"max_drop": 0.0, "calibrate": True}, "--max_drop must be between 0 and 1, not 0.0"),
        ({"confidence": 1.0, "calibrate": True}, "--confidence must be between 0 and 1, not 1.0"),
        ({"tolerance": -1.0}, "--tolerance must be 0 or more"),
        ({"checkpoint": "hub/id", "calibrate": True}, "hub/id must be a directory"),
    ],
)
def test_refuses_what_cannot_be_meant(tmp_path, changes, message):
    with pytest.raises(InputError, match=re.escape(message)):
        options(tmp_path, **changes)


WITHOUT_EFFECT = [
    ({"calibrate": True, "patience": "3"}, "--patience has no effect with --calibrate"),
    ({"calibrate": True, "driver": "pool"}, "--driver has no effect with --calibrate"),
    ({"calibrate": True, "predictions": "x"}, "--predictions has no effect with --calibrate"),
    ({"calibrate": True, "output": "x"}, "--output has no effect with --calibrate"),
    ({"calibrate": True, "sweep": True}, "--sweep has no effect with --calibrate"),
    ({"calibrate": True, "report": True}, "--report has no effect with --calibrate"),
    ({"calibrate": True, "time": True}, "--time has no effect with --calibrate"),
    ({"calibrate": True, "perturbed": "x"}, "--perturbed has no effect with --calibrate"),
    ({"calibrate": True, "all_checkpoints": True}, "--all_checkpoints has no effect"),
    ({"calibrate": True, "regression_threshold": 0.1}, "--regression_threshold has no effect"),
    ({"calibrate": True, "criterion": ["vote:votes=2"]}, "vote:votes=2 is one setting"),
    ({"perturbed": "x", "sweep": True}, "--sweep has no effect with --perturbed"),
    ({"perturbed": "x", "report": True}, "--report has no effect with --perturbed"),
    ({"perturbed": "x", "time": True}, "--time has no effect with --perturbed"),
    ({"perturbed": "x", "predictions": "x"}, "--predictions has no effect with --perturbed"),
    ({"perturbed": "x", "driver": "loop"}, "--driver has no effect with --perturbed"),
    ({"perturbed": "x", "split": "test"}, "--split has no effect with --perturbed"),
    ({"perturbed": "x", "all_checkpoints": True}, "--all_checkpoints has no effect"),
    ({"max_drop": 0.5}, "--max_drop has no effect without --calibrate"),
    ({"confidence": 0.5}, "--confidence has no effect without --calibrate"),
    ({"tolerance": 0.5}, "--tolerance has no effect without --calibrate or --sweep or --report"),
    (
        {"patience": None, "criterion": ["vote:votes=2"], "regression_threshold": 0.1},
        "--regression_threshold has no effect without --patience",
    ),
]


@pytest.mark.parametrize(("changes", "message"), WITHOUT_EFFECT)
def test_an_option_without_effect_is_refused(run, changes, message):
    with pytest.raises(InputError, match=re.escape(message)):
        options(run, **changes)


def test_a_sweep_needs_labels(run, tmp_path):
    with pytest.raises(InputError, match="--sweep needs labels; the test rows have none"):
        evaluate(options(run, output=str(tmp_path), sweep=True, split="test"), None)


def test_a_report_without_labels(run, tmp_path):
    evaluate(options(run, output=str(tmp_path), report=True, split="test"), None)
    page = (tmp_path / "report.html").read_text()
    assert "Where rows leave" in page and "Overthinking" not in page


def test_overwrite_leaves_no_results_of_the_run_before(run, studied, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(run, folder)
    shutil.copytree(studied, folder, dirs_exist_ok=True)
    for name in ("perturbed.csv", "perturbed.json"):
        (folder / name).touch()
    run_directory.prepare(folder, run_directory.read_config(folder), overwrite=True)
    assert [path.name for path in folder.iterdir()] == ["train_config.json"]


def test_settings_are_written_as_they_are_read():
    for text, shown in (
        ("patience:patience=3", "patience 3"),
        ("entropy:threshold=0.3", "entropy, threshold 0.3"),
        ("divergence:patience=2,threshold=1e-3", "divergence, patience 2, threshold 0.001"),
    ):
        assert describe(parse(text)) == shown
    assert from_config({"criterion": "vote", "votes": 2, "guarantee": {"rows": 1}}) == Vote(2)

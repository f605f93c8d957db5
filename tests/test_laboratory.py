"""Tests of the sweeps, the risk control and the report of `evaluate`."""

import csv
import dataclasses
import datetime
import json
import re
import shutil
import subprocess
import urllib.parse

import jax
import numpy as np
import pytest
from etils import epath
from safetensors.numpy import load_file

from evaluated import finished_run, options
from pabee_jax import EarlyExitClassifier, InputError, Patience, replay
from pabee_jax.analysis.selection import halves
from pabee_jax.checkpoints.saving import save_criterion
from pabee_jax.commands.evaluate import evaluate
from pabee_jax.criteria import (
    Divergence,
    Energy,
    Ensemble,
    Entropy,
    FixedLayer,
    Margin,
    MaxProbability,
    PatientConfidence,
    Vote,
    Window,
    describe,
    from_config,
    parse,
)
from pabee_jax.training import run_directory

ROWS = 400


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return finished_run(tmp_path_factory.mktemp("run"), rows=ROWS)


@pytest.fixture(scope="module")
def studied(run, tmp_path_factory):
    """The results of an evaluation with a sweep, a report and settings of several criteria."""
    output = tmp_path_factory.mktemp("studied")
    settings = ["entropy:threshold=0.6", "vote:votes=2"]
    evaluate(options(run, output=str(output), sweep=True, report=True, criterion=settings), None)
    return output


def lines_of(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_the_table_has_settings_of_every_criterion(studied):
    arrays = np.load(studied / "all_exit_logits.npz")
    rows = json.loads((studied / "results.json").read_text())["rows"]
    assert [row["criterion"] for row in rows] == ["patience"] * 4 + ["entropy", "vote"]
    for row, criterion in zip(rows[4:], (Entropy(0.6), Vote(2)), strict=True):
        exit_layers, exit_logits = map(np.asarray, replay(criterion, arrays["logits"]))
        assert row["mean_exit_layer"] == pytest.approx(exit_layers.mean())
        accuracy = (exit_logits.argmax(1) == arrays["labels"]).mean()
        assert row["accuracy"] == pytest.approx(accuracy)
    columns = lines_of(studied / "predictions.csv")[0]
    assert {"prediction_vote_votes_2", "exit_layer_entropy_threshold_0.6"} <= set(columns)
    assert {"patience", "threshold", "votes"} <= set(lines_of(studied / "results.csv")[0])


def test_a_sweep_writes_the_results_of_every_setting(studied):
    arrays = np.load(studied / "all_exit_logits.npz")
    content = json.loads((studied / "sweep.json").read_text())
    assert content["accuracy"]["full depth"] == pytest.approx(
        (arrays["logits"][-1].argmax(1) == arrays["labels"]).mean()
    )
    lines = lines_of(studied / "sweep.csv")
    assert len(lines) == len(content["settings"])
    patience_line = next(line for line in lines if line["setting"] == "patience 2")
    exit_layers, exit_logits = map(np.asarray, replay(Patience(2), arrays["logits"]))
    assert float(patience_line["mean_exit_layer"]) == pytest.approx(exit_layers.mean())
    assert float(patience_line["accuracy"]) == pytest.approx(
        (exit_logits.argmax(1) == arrays["labels"]).mean()
    )
    assert (studied / "sweep.png").read_bytes().startswith(b"\x89PNG")


def test_the_report_is_below_2_mb_and_makes_no_request(studied):
    page = (studied / "report.html").read_text()
    assert len(page) < 2_000_000
    for title in ("Trade-off", "Where rows exit", "Overthinking", "Hardest rows"):
        assert f"<h2>{title}</h2>" in page
    # `src`, `href` and `url()` cause requests; the names of XML namespaces do not.
    addresses = re.findall(r'(?:src|href)="([^"#]*)', page) + re.findall(r"url\(([^#)]*)", page)
    assert addresses and all(
        address.startswith("data:text/csv") for address in addresses if address
    )
    assert "default-src 'none'" in page and "<img" not in page and "<image" not in page


def section_of(page, title):
    return re.search(rf"<section[^>]*><h2>{title}</h2>.*?</section>", page, re.DOTALL).group()


def test_the_report_begins_with_the_table_of_results_json(studied):
    page = (studied / "report.html").read_text()
    results = json.loads((studied / "results.json").read_text())
    assert re.findall("<h2>(.*?)</h2>", page)[0] == "Settings"
    section = section_of(page, "Settings")
    header, *lines = [
        re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", line)
        for line in re.findall("<tr>(.*?)</tr>", section)
    ]
    assert header == [
        *("setting", "accuracy", "f1", "mean exit layer", "layers saved", "layer speed-up")
    ]
    fields = {"criterion", "patience", "threshold", "votes"}
    for line, row in zip(lines, results["rows"], strict=True):
        setting = from_config({name: row[name] for name in fields & row.keys()})
        assert line == [
            describe(setting),
            *(f"{100 * row[name]:.2f}" for name in ("accuracy", "f1")),
            f"{row['mean_exit_layer']:.2f}",
            f"{100 * row['layers_saved']:.1f}%",
            f"{row['layer_speedup']:.2f}x",
        ]
    # The CSV has full precision.
    address = re.search('href="data:text/csv;charset=utf-8,(.*?)"', section).group(1)
    downloaded = list(csv.DictReader(urllib.parse.unquote(address).splitlines()))
    for line, row in zip(downloaded, results["rows"], strict=True):
        for name in ("accuracy", "f1", "mean_exit_layer", "layers_saved", "layer_speedup"):
            assert float(line[name]) == row[name]


def test_the_report_states_the_model_the_versions_and_the_time(run, studied):
    page = (studied / "report.html").read_text()
    facts = dict(re.findall("<dt>(.*?)</dt><dd>(.*?)</dd>", page))
    assert facts["task and split"] == "files, dev" and facts["rows"] == str(ROWS)
    assert facts["checkpoint"] == str(run)
    assert facts["model"].startswith("bert, 5 layers with an exit each, hidden size 16")
    tensors = load_file(run / "model.safetensors")
    assert facts["parameters"] == f"{sum(array.size for array in tensors.values()):,}"
    assert f"jax {jax.__version__}, numpy {np.__version__}, Python 3." in facts["versions"]
    assert facts["hardware"] == f"{jax.device_count()} x {jax.devices()[0].device_kind}"
    written = datetime.datetime.fromisoformat(facts["written at (UTC)"])
    age = datetime.datetime.now(datetime.UTC) - written
    assert datetime.timedelta() <= age < datetime.timedelta(hours=1)


def test_the_overthinking_section_has_one_name_for_each_side(studied):
    section = section_of((studied / "report.html").read_text(), "Overthinking")
    assert "Kaya et al., 2019" in section
    for side in (
        "correct at this layer, wrong at full depth",
        "wrong at this layer, correct at full depth",
    ):
        assert re.search(rf"<text[^>]*>{side}</text>", section) and f"<th>{side}</th>" in section


@pytest.mark.slow
def test_one_row_has_a_report_and_cannot_be_calibrated(tmp_path):
    single = finished_run(tmp_path, rows=2)
    first_line = (tmp_path / "dev.jsonl").read_text().splitlines()[0]
    (tmp_path / "dev.jsonl").write_text(first_line + "\n")
    output = tmp_path / "results"
    names = ["patience,divergence,entropy"]
    changes = {"sweep": True, "report": True, "criterion": names}
    evaluate(options(single, output=str(output), **changes), None)
    assert "<h2>Overthinking</h2>" in (output / "report.html").read_text()
    with pytest.raises(InputError, match="needs at least 2 rows.*; the dev split has 1"):
        evaluate(options(single, calibrate=True, max_drop=0.9, confidence=0.1), None)


CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")


@pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed")
@pytest.mark.parametrize("width", [400, 1400])
def test_the_report_fits_the_window_and_its_text_is_legible(studied, tmp_path, width):
    """No element is wider than the page, and all text in a figure is at least 8 pixels high."""
    script = """<script>
      addEventListener("load", () => {
        const boxes = (parent, selector) => [...parent.querySelectorAll(selector)]
          .map(element => element.getBoundingClientRect());
        const wide = boxes(document, "svg, section, li").filter(box => box.right > innerWidth);
        const figures = document.querySelectorAll("svg");
        const small = [...figures].flatMap(figure => boxes(figure, "text"))
          .filter(box => box.height < 8);
        const counts = [innerWidth, figures.length, wide.length, small.length];
        parent.postMessage(counts.join(" "), "*");
      });
    </script>"""
    page = (studied / "report.html").read_text()
    page = page.replace("default-src 'none'", "default-src 'none'; script-src 'unsafe-inline'")
    (tmp_path / "page.html").write_text(page.replace("</body>", f"{script}</body>"))
    # Chromium limits the width of a window to more than the width of a phone. The width of a frame
    # has no limit.
    (tmp_path / "frame.html").write_text(
        "<script>addEventListener('message', event => document.title = event.data)</script>"
        f'<iframe src="page.html" style="width:{width}px; height:900px; border:0"></iframe>'
    )
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--window-size=1500,1000"]
    command += ["--dump-dom", f"--user-data-dir={tmp_path}", f"file://{tmp_path}/frame.html"]
    browser = subprocess.run(command, capture_output=True, text=True, timeout=120)
    (title,) = re.findall(r"<title>(.*?)</title>", browser.stdout)
    page_width, figures, wide, small = map(int, title.split())
    assert abs(page_width - width) <= 20 and figures == 6  # A scroll bar takes some of the width.
    assert (wide, small) == (0, 0), (
        f"at {width} pixels, {wide} elements are wider than the page and {small} texts are lower "
        "than 8 pixels"
    )


def test_risk_control_stores_the_setting_with_its_guarantee(run, tmp_path, capsys):
    copy = shutil.copytree(run, tmp_path / "run")
    evaluate(options(copy, calibrate=True, max_drop=0.6, criterion=["entropy"]), None)
    printed = capsys.readouterr().out
    stored = json.loads((copy / "config.json").read_text())["early_exit"]
    assert stored["criterion"] == "entropy" and stored["guarantee"]["max_drop"] == 0.6
    classifier = EarlyExitClassifier.from_pretrained(str(copy), driver="full")
    assert classifier.criterion == Entropy(stored["threshold"])
    # A replay of the calibration rows gives the stored counts.
    logits = classifier.all_exit_logits([json.loads(line)["text"] for line in dev_lines(run)])
    calibration_rows, other_rows = halves(ROWS)
    labels = np.array([0, 1] * (ROWS // 2))[calibration_rows]
    calibration_logits = logits[:, calibration_rows]
    exit_layers, exit_logits = map(np.asarray, replay(classifier.criterion, calibration_logits))
    correct = calibration_logits[-1].argmax(1) == labels
    harmed = int((correct & (exit_logits.argmax(1) != labels)).sum())
    guarantee = stored["guarantee"]
    assert (guarantee["harmed"], guarantee["rows"]) == (harmed, ROWS // 2)
    assert guarantee["mean_exit_layer"] == pytest.approx(exit_layers.mean())
    assert f"on the other {len(other_rows)} rows" in printed
    assert describe(classifier.criterion) in printed
    card = (copy / "README.md").read_text()
    assert f"- Exit criterion: {describe(classifier.criterion)}\n" in card


def dev_lines(run):
    return (run.parent / "dev.jsonl").read_text().splitlines()


def test_the_checkpoint_is_unchanged_if_no_setting_qualifies(run, tmp_path):
    copy = shutil.copytree(run, tmp_path / "run")
    before = (copy / "config.json").read_bytes()
    with pytest.raises(InputError, match="200 calibration rows are too few.*299 rows"):
        evaluate(options(copy, calibrate=True), None)
    assert (copy / "config.json").read_bytes() == before


def test_the_halves_are_fixed_and_share_no_row():
    for rows in (1, 2, 7, 100):
        calibration_rows, other_rows = halves(rows)
        assert sorted([*calibration_rows, *other_rows]) == list(range(rows))
        assert len(calibration_rows) == (rows + 1) // 2
        assert calibration_rows.tolist() == halves(rows)[0].tolist()


def test_save_pretrained_preserves_a_stored_setting(run, tmp_path):
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
        ({"criterion": ["energy:threshold=-inf"]}, "'threshold=-inf' is not FIELD=NUMBER"),
        ({"criterion": ["energy:threshold=1e999"]}, "'threshold=1e999' is not FIELD=NUMBER"),
        ({"criterion": ["entropy:threshold=0x1"]}, "is not FIELD=NUMBER"),
        ({"criterion": ["entropy:threshold=.1,threshold=.2"]}, "gives threshold twice"),
        ({"criterion": ["vote:votes=1E20"]}, "votes must be a whole number"),
        ({"criterion": ["entropy:threshold=1.5"]}, "must be a number from 0 to 1, not 1.5"),
        ({"criterion": ["vote:votes=1.5"]}, "votes must be a whole number"),
        ({"max_drop": 0.0, "calibrate": True}, "--max_drop must be between 0 and 1, not 0.0"),
        ({"confidence": 1.0, "calibrate": True}, "--confidence must be between 0 and 1, not 1.0"),
        ({"tolerance": -1.0}, "--tolerance must be 0 or more"),
        ({"checkpoint": "hub/id", "calibrate": True}, "hub/id must be a directory"),
    ],
)
def test_invalid_options_are_input_errors(tmp_path, changes, message):
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
    ({"calibrate": True, "overwrite": True}, "--overwrite has no effect with --calibrate"),
    ({"max_drop": 0.5}, "--max_drop has no effect without --calibrate"),
    ({"confidence": 0.5}, "--confidence has no effect without --calibrate"),
    ({"tolerance": 0.5}, "--tolerance has no effect without --calibrate or --sweep or --report"),
    (
        {"patience": None, "criterion": ["vote:votes=2"], "regression_threshold": 0.1},
        "--regression_threshold has no effect without --patience",
    ),
]


@pytest.mark.parametrize(("changes", "message"), WITHOUT_EFFECT)
def test_an_option_without_effect_is_an_input_error(run, changes, message):
    with pytest.raises(InputError, match=re.escape(message)):
        options(run, **changes)


def test_a_sweep_needs_labels(run, tmp_path):
    with pytest.raises(InputError, match="--sweep needs labels; the test rows have none"):
        evaluate(options(run, output=str(tmp_path), sweep=True, split="test"), None)


def test_a_report_without_labels_omits_the_sections_that_need_labels(run, tmp_path):
    evaluate(options(run, output=str(tmp_path), report=True, split="test"), None)
    page = (tmp_path / "report.html").read_text()
    assert "Where rows exit" in page and "Overthinking" not in page


def test_overwrite_removes_the_results_of_the_previous_run(run, studied, tmp_path):
    folder = epath.Path(tmp_path / "run")
    shutil.copytree(run, folder)
    shutil.copytree(studied, folder, dirs_exist_ok=True)
    for name in ("perturbed.csv", "perturbed.json"):
        (folder / name).touch()
    (folder / "results-test").mkdir()
    run_directory.prepare(folder, run_directory.read_config(folder), {}, overwrite=True)
    assert {path.name for path in folder.iterdir()} == {"train_config.json", "train_inputs.json"}


def test_a_setting_is_described_by_its_name_and_its_fields():
    for text, description in (
        ("patience:patience=3", "patience 3"),
        ("entropy:threshold=0.3", "entropy, threshold 0.3"),
        ("divergence:patience=2,threshold=1e-3", "divergence, patience 2, threshold 0.001"),
    ):
        assert describe(parse(text)) == description
    assert from_config({"criterion": "vote", "votes": 2, "guarantee": {"rows": 1}}) == Vote(2)


@pytest.mark.parametrize(
    ("text", "setting"),
    [
        ("entropy:threshold=1E-3", Entropy(0.001)),
        ("entropy:threshold=1e-3", Entropy(0.001)),
        ("entropy:threshold=.5", Entropy(0.5)),
        ("entropy:threshold=1.", Entropy(1.0)),
        ("entropy:threshold=+1", Entropy(1.0)),
        ("entropy: threshold = 0.5", Entropy(0.5)),
        ("max_probability:threshold=9E-1", MaxProbability(0.9)),
        ("margin:threshold=.25", Margin(0.25)),
        ("energy:threshold=-1E1,temperature=5E-1", Energy(-10.0, 0.5)),
        ("divergence:threshold=1E-3,patience=2.", Divergence(2, 0.001)),
        ("patient_confidence:threshold=5E-1,patience=+2", PatientConfidence(2, 0.5)),
        ("ensemble:threshold=2E0", Ensemble(2.0)),
        ("patience:patience=1E1,regression_threshold=1E-1", Patience(10, 0.1)),
        ("vote:votes=2.0", Vote(2)),
        ("fixed_layer:layer=3e0", FixedLayer(3)),
        ("window:votes=2.0,window=3e0", Window(2, 3)),
    ],
)
def test_the_fields_of_every_criterion_take_the_usual_spellings_of_numbers(text, setting):
    parsed = parse(text)
    assert parsed == setting
    assert [type(value) for value in vars(parsed).values()] == [
        {"int": int, "float": float}[getattr(field.type, "__name__", field.type)]
        for field in dataclasses.fields(setting)
    ]

"""Results are written together, and never over files that the command did not write."""

import json

import pytest

from evaluated import finished_run, options
from pabee_jax import EarlyExitClassifier, InputError
from pabee_jax.commands import evaluate_results
from pabee_jax.commands.evaluate import evaluate
from pabee_jax.reports.results_folder import ResultsFolder
from pabee_jax.training import run_directory
from runs import contents


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return finished_run(tmp_path_factory.mktemp("run"), rows=9)


def write(folder, **files):
    with ResultsFolder(folder, "index.json").replace() as staging:
        for name, text in files.items():
            (staging / f"{name}.json").write_text(text)


def test_files_are_written_together_or_not_at_all(tmp_path):
    write(tmp_path, index='{"files": ["a.json", "index.json"]}', a="1")
    before = contents(tmp_path)
    with pytest.raises(RuntimeError), ResultsFolder(tmp_path, "index.json").replace() as folder:
        (folder / "a.json").write_text("2")
        raise RuntimeError
    assert contents(tmp_path) == before
    (tmp_path / "b.json").mkdir()
    with pytest.raises(InputError, match=r"cannot be written: .*b.json: Is a directory"):
        write(tmp_path, a="2", b="2")
    assert contents(tmp_path) == before
    assert not list(tmp_path.glob(".results-*")), "a temporary folder remains"


def test_stale_files_are_removed_after_the_others_are_written(tmp_path):
    write(tmp_path, old="1")
    with ResultsFolder(tmp_path, "index.json").replace(stale=["old.json"]) as folder:
        assert (tmp_path / "old.json").exists()
        (folder / "new.json").write_text("1")
    assert [path.name for path in tmp_path.iterdir()] == ["new.json"]


@pytest.mark.parametrize("index", [None, "[]", "{}", '{"files": 3}', "\x00", '{"files": ["b"]}'])
def test_a_file_that_the_command_did_not_write_is_not_replaced(index, tmp_path):
    (tmp_path / "a.json").write_text("the user's")
    if index is not None:
        (tmp_path / "index.json").write_text(index)
    with pytest.raises(InputError, match=r"a\.json exists and was not written by this command"):
        ResultsFolder(tmp_path, "index.json").check(["a.json"])
    ResultsFolder(tmp_path, "index.json").check(["c.json"])
    ResultsFolder(tmp_path, "index.json", overwrite=True).check(["a.json"])


def test_evaluate_refuses_a_folder_with_files_of_the_user_before_it_computes(
    run, tmp_path, monkeypatch
):
    (tmp_path / "tradeoff.png").write_bytes(b"my picture")
    monkeypatch.delattr(EarlyExitClassifier, "all_exit_logits")
    with pytest.raises(InputError, match=r"tradeoff\.png exists .* --overwrite"):
        evaluate(options(run, output=str(tmp_path)), None)
    assert contents(tmp_path) == {"tradeoff.png": b"my picture"}


@pytest.mark.slow
def test_evaluate_refuses_to_replace_results_of_another_split(run, tmp_path):
    evaluate(options(run, output=str(tmp_path)), None)
    before = contents(tmp_path)
    with pytest.raises(InputError, match="holds results of split dev, not test"):
        evaluate(options(run, output=str(tmp_path), split="test"), None)
    assert contents(tmp_path) == before
    evaluate(options(run, output=str(tmp_path), split="test", overwrite=True), None)
    assert not (tmp_path / "tradeoff.png").exists(), "the figure of other results remains"


def test_results_on_other_rows_go_beside_the_results_of_the_run(run):
    before = contents(run)
    evaluate(options(run, split="test"), None)
    evaluate(options(run), run_directory.read_config(run))
    after = contents(run)
    assert {name: after[name] for name in before} == before
    assert {name.split("/")[0] for name in after.keys() - before} == {
        "results-test",
        "results-files",
    }


@pytest.mark.slow
def test_a_sweep_remains_only_beside_results_with_the_same_logits(run, tmp_path):
    evaluate(options(run, output=str(tmp_path), sweep=True, criterion=["patience"]), None)
    evaluate(options(run, output=str(tmp_path)), None)
    assert {"sweep.png", "sweep.csv", "sweep.json"} <= {path.name for path in tmp_path.iterdir()}
    index = json.loads((tmp_path / "results.json").read_text())
    assert index["files"] == sorted(path.name for path in tmp_path.iterdir())
    (tmp_path / "results.json").write_text(json.dumps(index | {"logits_sha256": "another's"}))
    evaluate(options(run, output=str(tmp_path)), None)
    assert not list(tmp_path.glob("sweep.*"))
    assert (tmp_path / "tradeoff.png").exists()


def test_a_figure_that_fails_leaves_the_data_complete(run, tmp_path, monkeypatch):
    def fail(*_):
        raise RuntimeError("no font")

    monkeypatch.setattr(evaluate_results.plots, "plot_tradeoff", fail)
    with pytest.raises(RuntimeError):
        evaluate(options(run, output=str(tmp_path)), None)
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"results.json", "results.csv", "predictions.csv", "all_exit_logits.npz"}


def test_predictions_do_not_replace_a_file(run, tmp_path):
    (tmp_path / "MNLI-mm.tsv").write_text("the user's")
    changes = {"patience": "1", "predictions": str(tmp_path / "MNLI.tsv")}
    with pytest.raises(InputError, match=r"MNLI-mm\.tsv exists; replace it with --overwrite"):
        options(run, **changes)
    options(run, **changes, overwrite=True)

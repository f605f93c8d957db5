"""The model card, and the upload to the hub."""

import huggingface_hub
import pytest
from etils import epath
from huggingface_hub import ModelCard

from helpers import tiny_checkpoint
from pabee_jax import EarlyExitClassifier, InputError, Patience
from pabee_jax.checkpoints import hub
from pabee_jax.checkpoints.saving import save_criterion
from pabee_jax.criteria import Entropy
from pabee_jax.training.run import train
from runs import run_config, sources  # noqa: F401


@pytest.fixture(scope="module")
def classifier(tmp_path_factory):
    directory = tiny_checkpoint(tmp_path_factory.mktemp("card") / "encoder", ["good", "bad"])
    return EarlyExitClassifier.from_pretrained(str(directory), num_labels=2, criterion=Patience(1))


def test_a_saved_checkpoint_has_a_card_that_the_hub_reads(classifier, tmp_path):
    classifier.save_pretrained(tmp_path)
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.library_name == "pabee_jax"
    assert card.data.pipeline_tag == "text-classification"
    assert "LABEL_0, LABEL_1" in card.text and "patience" in card.text.lower()
    (tmp_path / "README.md").write_text("my own words")
    classifier.save_pretrained(tmp_path)
    assert (tmp_path / "README.md").read_text() == "my own words"


@pytest.mark.slow
def test_the_card_of_a_run_has_its_settings_and_its_table_and_the_licence(
    sources,  # noqa: F811
    tmp_path,
):
    (sources / "model" / "README.md").write_text("---\nlicense: apache-2.0\n---\n")
    train(run_config(sources), tmp_path / "run")
    (sources / "model" / "README.md").unlink()
    card = ModelCard.load(tmp_path / "run" / "README.md")
    assert card.data.license == "apache-2.0" and card.data.base_model == "model"
    for part in ("learning_rate=0.003", "dev, 23 rows", "accuracy", "no, yes"):
        assert part in card.text, part
    assert str(sources) not in card.content, "a path of this machine"


def test_a_criterion_that_is_stored_later_is_in_the_card(classifier, tmp_path):
    """As `evaluate --calibrate` does; the other lines and a README.md of the user's stay."""
    classifier.save_pretrained(tmp_path)
    before = (tmp_path / "README.md").read_text()
    line = "- Exit criterion: patience 1\n"
    assert line in before
    save_criterion(epath.Path(tmp_path), Entropy(0.25))
    after = (tmp_path / "README.md").read_text()
    assert after == before.replace(line, "- Exit criterion: entropy, threshold 0.25\n")
    (tmp_path / "README.md").write_text(line)
    save_criterion(epath.Path(tmp_path), Patience(0))
    assert (tmp_path / "README.md").read_text() == line
    (tmp_path / "README.md").unlink()
    save_criterion(epath.Path(tmp_path), Patience(1))
    assert not (tmp_path / "README.md").exists()


def test_an_upload_is_one_commit_of_the_checkpoint(classifier, monkeypatch):
    """A stand-in for the hub's client; the names and arguments are those of the real one."""
    calls = {}

    def create_repo(self, repo_id, *, private, exist_ok):
        calls["create"] = (repo_id, private, exist_ok)
        return huggingface_hub.RepoUrl(f"https://huggingface.co/me/{repo_id}")

    def upload_folder(self, *, repo_id, folder_path, commit_message):
        import pathlib

        calls["files"] = {path.name for path in pathlib.Path(folder_path).iterdir()}
        calls["repo"] = repo_id

    monkeypatch.setattr(hub.huggingface_hub.HfApi, "create_repo", create_repo)
    monkeypatch.setattr(hub.huggingface_hub.HfApi, "upload_folder", upload_folder)
    assert classifier.push_to_hub("exits", private=True).endswith("me/exits")
    assert calls["create"] == ("exits", True, True) and calls["repo"] == "me/exits"
    assert {"README.md", "config.json", "model.safetensors", "tokenizer.json"} <= calls["files"]


@pytest.mark.parametrize(
    ("repository", "message"),
    [("a b", "is no repository of the hub"), ("me/exits", "the hub (refuses|cannot be reached)")],
)
def test_an_upload_that_fails_is_one_sentence(classifier, repository, message, monkeypatch):
    """Against a port at which nobody listens."""
    monkeypatch.setattr(hub.huggingface_hub.HfApi, "__init__", offline)
    with pytest.raises(InputError, match=message) as error:
        classifier.push_to_hub(repository)
    assert "\n" not in str(error.value)


original_init = huggingface_hub.HfApi.__init__


def offline(self, *, token=None):
    original_init(self, endpoint="http://127.0.0.1:9", token="hf_none")

"""The documentation: its reference is complete, its examples run, and its links lead somewhere."""

import inspect
import re
from pathlib import Path

import numpy as np
import pytest

import pabee_jax
from helpers import tiny_checkpoint

ROOT = Path(__file__).parent.parent
PAGES = sorted((ROOT / "docs").glob("*.md"))


def code_blocks(page: str, language: str) -> list[str]:
    text = (ROOT / page).read_text(encoding="utf-8")
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def test_everything_that_the_package_exports_is_in_the_reference():
    text = (ROOT / "docs" / "reference.md").read_text(encoding="utf-8")
    documented = set(
        re.findall(r"auto(?:class|function|exception):: pabee_jax\.(\w+)$", text, re.M)
    )
    assert documented == set(pabee_jax.__all__)


@pytest.mark.parametrize("name", pabee_jax.__all__)
def test_every_exported_name_says_what_it_is(name):
    exported = getattr(pabee_jax, name)
    first_line, *rest = inspect.getdoc(exported).splitlines()
    assert first_line.endswith("."), "the first line of a docstring is a sentence"
    if inspect.isfunction(exported) and inspect.signature(exported).parameters:
        assert "Args:" in rest or len(rest) > 2


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_a_page_has_at_most_1500_words(page):
    assert len(page.read_text(encoding="utf-8").split()) <= 1500


def test_the_readme_has_at_most_150_lines():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 150


@pytest.mark.parametrize("page", ["docs/python.md", "docs/criteria.md", "docs/extend.md"])
def test_the_python_examples_run(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    # The examples register a criterion, which other tests must not see.
    registry = pabee_jax.criteria.registry
    monkeypatch.setattr(registry, "CRITERIA", dict(registry.CRITERIA))
    encoder = tiny_checkpoint(tmp_path / "encoder", ["a", "text"])
    classifier = pabee_jax.EarlyExitClassifier.from_pretrained(str(encoder), num_labels=2)
    classifier.save_pretrained("runs/mrpc")
    (tmp_path / "runs" / "sst2").symlink_to(tmp_path / "runs" / "mrpc")
    names = {
        "texts": ["a text", "another text"],
        "batch": {"input_ids": np.ones((2, 4), np.int32)},
        "EarlyExitClassifier": pabee_jax.EarlyExitClassifier,
        "Consistency": pabee_jax.Consistency,
    }
    for block in code_blocks(page, "python"):
        if "import ray" not in block:
            block = re.sub(r"(?m)^classifier\.push_to_hub.*$", "", block)
            exec(compile(block, page, "exec"), names)


@pytest.mark.parametrize(
    "page", [*PAGES, ROOT / "README.md", ROOT / "CONTRIBUTING.md"], ids=lambda page: page.name
)
def test_every_link_to_a_file_of_the_repository_leads_somewhere(page):
    text = page.read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if "://" not in target and not target.startswith("#"):
            assert (page.parent / target.partition("#")[0]).exists(), target

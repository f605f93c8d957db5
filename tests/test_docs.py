"""The documentation: its reference is complete, its examples run, and its links lead somewhere."""

import doctest
import inspect
import json
import re
from pathlib import Path

import jax
import numpy as np
import pytest

import pabee_jax
from benchmarks import pictures
from benchmarks.evidence import tables
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


def table_after(heading: str, page: str) -> list[list[str]]:
    """Return the cells of the first table after a heading, without the rule below the header."""
    text = (ROOT / page).read_text(encoding="utf-8").partition(f"\n{heading}\n")[2]
    table = re.search(r"^\|.*\n(?:\|.*\n)+", text, re.MULTILINE)
    assert table, f"{page} has no table after {heading}"
    return cells(table[0])


def cells(table: str) -> list[list[str]]:
    header, _, *lines = [line.strip("| \n").split("|") for line in table.splitlines()]
    return [[cell.strip() for cell in line] for line in (header, *lines)]


def test_the_results_are_those_of_the_recorded_logits():
    content = json.loads((ROOT / "docs/data/evidence/evidence.json").read_text(encoding="utf-8"))
    expected = cells(tables.headline(content))
    assert table_after("## Twelve layers: MPNet-base", "docs/results.md") == expected
    # The two pages that everybody reads first repeat the range of the measured speed-ups at 2x.
    column = expected[0].index("2x")
    speedups = [float(re.search(r"([\d.]+)x pool", line[column])[1]) for line in expected[1:]]
    for page in ("README.md", "docs/index.md"):
        text = " ".join((ROOT / page).read_text(encoding="utf-8").split())
        assert f"{min(speedups):.1f} to {max(speedups):.1f} times as fast" in text


def test_the_pictures_are_drawn_from_the_recorded_results(tmp_path):
    pictures.main(pictures.make_parser().parse_args([f"--output={tmp_path}"]))
    drawn = {path.name for path in tmp_path.iterdir()}
    others = {"early_exit_loop.png", "early_exit_pool.png", "playground.png"}
    assert drawn | others == {path.name for path in (ROOT / "docs").glob("*.png")}


@pytest.fixture
def reader(tmp_path, monkeypatch, own_criteria):
    """The names that examples use without a definition, in a directory with the runs they open."""
    monkeypatch.chdir(tmp_path)
    encoder = tiny_checkpoint(tmp_path / "encoder", ["a", "text"])
    classifier = pabee_jax.EarlyExitClassifier.from_pretrained(str(encoder), num_labels=2)
    classifier.save_pretrained("runs/mrpc")
    (tmp_path / "runs" / "sst2").symlink_to(tmp_path / "runs" / "mrpc")
    return {
        "texts": ["a text", "another text"],
        "batch": {"input_ids": np.ones((2, 4), np.int32)},
    }


@pytest.mark.parametrize("page", ["docs/python.md", "docs/criteria.md", "docs/extend.md"])
def test_the_python_examples_run(page, reader):
    for block in code_blocks(page, "python"):
        if "import ray" not in block:
            block = re.sub(r"(?m)^classifier\.push_to_hub.*$", "", block)
            exec(compile(block, page, "exec"), reader)


def examples() -> dict[str, doctest.DocTest]:
    """Return the docstrings with examples, of what the package and `pabee_jax.criteria` export."""
    names = {name: getattr(pabee_jax, name) for name in pabee_jax.__all__}
    names |= vars(pabee_jax.criteria) | {"jax": jax, "np": np}
    finder = doctest.DocTestFinder(exclude_empty=True)
    found = {}
    for name, value in names.items():
        if getattr(value, "__module__", "").startswith("pabee_jax."):
            for example in finder.find(value, name, module=False, globs=names):
                if example.examples:
                    found[example.name] = example
    return found


EXAMPLES = examples()


@pytest.mark.parametrize("name", sorted(EXAMPLES))
def test_the_examples_of_a_docstring_run(name, reader):
    output = []
    failed, _ = doctest.DocTestRunner().run(EXAMPLES[name], out=output.append)
    assert not failed, "".join(output)


def test_the_functions_of_the_public_interface_have_examples():
    assert set(EXAMPLES) > {"EarlyExitClassifier", "early_exit", "replay", "replay_many"}


@pytest.mark.parametrize(
    "page", [*PAGES, ROOT / "README.md", ROOT / "CONTRIBUTING.md"], ids=lambda page: page.name
)
def test_every_link_to_a_file_of_the_repository_leads_somewhere(page):
    text = page.read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if "://" not in target and not target.startswith("#"):
            assert (page.parent / target.partition("#")[0]).exists(), target

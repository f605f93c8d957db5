"""Every command of the documentation is accepted by its parser and its checks."""

import importlib
import re
import shlex
from pathlib import Path

import pytest
from absl import flags

from pabee_jax.commands import command_line
from pabee_jax.commands.main import COMMANDS
from pabee_jax.commands.options import read_flags
from pabee_jax.training import config as training_config
from test_fuzz_options import OPTIONS

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
# Inside of a sentence, only these are whole commands.
IN_A_SENTENCE = r"`(python -m benchmarks\.\w+[^`]*|pabee-jax \w+ --c(?:heckpoint|onfig) [^`]*)`"


def commands_of(page: Path) -> list[str]:
    """Return the commands of the package and of its benchmarks, with their arguments."""
    text = page.read_text(encoding="utf-8")
    blocks = re.findall(r"^ *```bash\n(.*?)^ *```$", text, re.MULTILINE | re.DOTALL)
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    lines += [" ".join(match.split()) for match in re.findall(IN_A_SENTENCE, text)]
    return [shlex.join(words) for line in lines if (words := command_in(line))]


def command_in(line: str) -> list[str]:
    """Return the words of the command in a line; none if the line runs something else."""
    words = shlex.split(line, comments=True)
    for index, word in enumerate(words):
        if "pabee-jax " in word:  # A command that another command runs on other machines.
            return command_in(word.split("&&")[-1])
        if word.removeprefix(".venv/bin/") == "pabee-jax":
            words = ["pabee-jax", *words[index + 1 :]]
            return words[: words.index("&")] if "&" in words else words
        if word == "-m" and words[index + 1].startswith("benchmarks."):
            return ["python", *words[index:]]
    return []


def parser_of(benchmark: str):
    module = importlib.import_module(benchmark)
    if hasattr(module, "__path__"):
        module = importlib.import_module(f"{benchmark}.__main__")
    return module.make_parser()


# A criterion of a plugin is unknown here; tests/test_docs_pages.py runs these commands.
CASES = sorted(
    {
        (page.name, command)
        for page in PAGES
        for command in commands_of(page)
        if "--plugin" not in command
    }
)


def test_the_documentation_has_commands_of_every_kind():
    """The tests below find nothing wrong if nothing is found."""
    shown = {words[1] for _, command in CASES if (words := command.split())[0] == "pabee-jax"}
    assert shown == set(COMMANDS)
    benchmarks = {command.split()[2] for _, command in CASES if command.startswith("python")}
    assert len(benchmarks) > 15


@pytest.mark.parametrize(("page", "command"), CASES, ids=lambda value: value[:60])
def test_a_command_of_the_documentation_is_accepted(page, command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = shlex.split(command.replace("SEED", "0").replace("'$i'", "0"))
    if words[0] == "python":
        parser_of(words[2]).parse_args(words[3:])
        return
    name, argv = words[1], words[1:]
    if "--checkpoint" in argv:  # The directory must exist for some of the options.
        (tmp_path / argv[argv.index("--checkpoint") + 1]).mkdir(parents=True)
    values = flags.FlagValues()
    command_line.define(OPTIONS[name], argv, values)
    fields = getattr(OPTIONS[name], "config_fields", None)
    command_line.parse(argv, values, positional=name == "compare", config_fields=fields)
    read_flags(OPTIONS[name], values)
    if name == "train":
        training_config.check(values["config"].value)

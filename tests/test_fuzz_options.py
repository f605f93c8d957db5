"""Any value of any flag of any command is accepted or refused with one sentence."""

import contextlib
import dataclasses
import io
import pkgutil

import hypothesis
import pytest
from absl import flags
from hypothesis import strategies

from pabee_jax import InputError
from pabee_jax.commands import command_line
from pabee_jax.commands.main import COMMANDS
from pabee_jax.commands.options import read_flags
from pabee_jax.training.config import TrainConfig, leaves

OPTIONS = {
    name: pkgutil.resolve_name(f"pabee_jax.commands.{command.options}")
    for name, command in COMMANDS.items()
}
ODD_VALUES = ["", "0", "1", "-1", "1e9", "nan", "inf", "-inf", "1.5", "true", "maybe", "None"]
ODD_VALUES += ["0,1", "1,,2", "patience", "patience:patience=1", "vote:", "entropy:threshold=nan"]
ODD_VALUES += ["files", "glue", "glue:mrpc", "/nope.py", "~nosuchuser/x", "gs:/", "s3://x", "pool"]
ODD_VALUES += ["demo", "dev", "--", "=", "cpu,cuda", ".", "/", "é", "1" * 5000, "x" * 300]
ODD_VALUES += ["\0", "\udcff", "a\nb"]
VALUES = strategies.one_of(
    strategies.sampled_from(ODD_VALUES),
    strategies.text(max_size=12),
    strategies.integers().map(str),
    strategies.floats().map(str),
)


@strategies.composite
def arguments(draw):
    """Return the name of a command and arguments for it, most of which name its own flags."""
    name = draw(strategies.sampled_from(sorted(OPTIONS)))
    fields = [field.name for field in dataclasses.fields(OPTIONS[name])]
    fields += [f"no{field}" for field in fields] + ["absent", "flagfile", ""]
    if name in ("train", "evaluate"):
        fields += [
            "config",
            "config.absent",
            *(f"config.{field}" for field in leaves(TrainConfig())),
        ]
    flag = strategies.builds(
        "{}{}{}{}".format,
        strategies.sampled_from(["--", "-", ""]),
        strategies.sampled_from(fields),
        strategies.sampled_from(["=", "=", "=", ""]),
        VALUES,
    )
    return name, draw(strategies.lists(flag, max_size=4))


def check(case):
    name, given = case
    values, argv = flags.FlagValues(), [name, *given]
    output = io.StringIO()
    try:
        with contextlib.redirect_stderr(output), contextlib.redirect_stdout(output):
            command_line.define(OPTIONS[name], argv, values)
            fields = getattr(OPTIONS[name], "config_fields", None)
            command_line.parse(argv, values, positional=name == "compare", config_fields=fields)
            options = read_flags(OPTIONS[name], values)
    except SystemExit as stopped:
        assert stopped.code == 2
        message = output.getvalue()
        assert message.startswith("error: ") and message.count("\n") == 1, message
    except InputError as error:
        assert "\n" not in str(error).strip()
    else:
        assert isinstance(options, OPTIONS[name])


@hypothesis.settings(max_examples=100, deadline=None, derandomize=True, database=None)
@hypothesis.given(arguments())
def test_any_arguments_are_accepted_or_refused_with_one_sentence(case):
    check(case)


@pytest.mark.slow
@hypothesis.settings(max_examples=10_000, deadline=None, derandomize=True, database=None)
@hypothesis.given(arguments())
def test_ten_thousand_arguments_are_accepted_or_refused_with_one_sentence(case):
    check(case)

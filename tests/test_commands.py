"""The command pabee-jax: its subcommands, its options, and the configurations of the package."""

import dataclasses
import importlib
import pkgutil
import re
import subprocess
import sys
from pathlib import Path

import pytest
from absl import flags

from pabee_jax import InputError, __version__
from pabee_jax.commands import command_line
from pabee_jax.commands.config_file import BUILT_IN, load_config
from pabee_jax.commands.evaluate_options import EvaluateOptions
from pabee_jax.commands.main import COMMANDS, main
from pabee_jax.commands.options import define_flags, option, read_flags
from pabee_jax.commands.plugins import run_plugins
from pabee_jax.commands.train_options import TrainOptions
from pabee_jax.training.config import TrainConfig, leaves

ROOT = Path(__file__).parents[1]


def test_help_lists_every_command(capsys):
    main(["pabee-jax", "--help"])
    assert {"train", "evaluate", "compare", "export"} <= set(capsys.readouterr().out.split())
    for name in COMMANDS:
        assert callable(importlib.import_module(f"pabee_jax.commands.{name}").main)


def test_help_of_a_command_lists_every_option_and_imports_no_heavy_library():
    code = (
        "import sys; from pabee_jax.commands.main import main\n"
        "for name in sys.argv[1:]: main(['pabee-jax', name, '--help']); print('END')\n"
        "print(*sys.modules)"
    )
    command = [sys.executable, "-c", code, *COMMANDS]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True)
    *texts, modules = done.stdout.split("END\n")
    # What takes seconds to import.
    assert not {"flax", "transformers", "orbax", "datasets", "matplotlib"} & set(modules.split())
    for name, shown in zip(COMMANDS, texts, strict=True):
        options = pkgutil.resolve_name(f"pabee_jax.commands.{COMMANDS[name].options}")
        names = {field.name for field in dataclasses.fields(options)}
        if name in ("train", "evaluate"):
            names |= {"config", *(f"config.{field}" for field in options.config_fields)}
        listed = re.findall(r"^  --(?:\[no\])?([\w.]+):", shown, re.MULTILINE)
        assert sorted(listed) == sorted(names)


def test_help_shows_the_default_and_the_description_of_a_field_of_the_configuration(capsys):
    main(["pabee-jax", "train", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    for field, default in leaves(TrainConfig()).items():
        default = str(default).lower() if isinstance(default, bool) else default
        of_field = rf"config\.{re.escape(field)}: (?!see `)\w?(?:(?!--).)*\(default: '{default}'\)"
        assert re.search(of_field, text), f"{field} has no description or no default"


@pytest.mark.parametrize(("arguments", "message"), [([], "missing"), (["trian"], "'trian'")])
def test_an_unknown_command_ends_with_status_2_and_the_usage(arguments, message, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["pabee-jax", *arguments])
    assert stop.value.code == 2
    stderr = capsys.readouterr().err
    assert message in stderr and "usage: pabee-jax COMMAND" in stderr


def test_version(capsys):
    main(["pabee-jax", "--version"])
    assert capsys.readouterr().out == f"pabee_jax {__version__}\n"


@pytest.mark.slow
@pytest.mark.parametrize("module", ["pabee_jax.compare", "pabee_jax.export"])
def test_the_modules_are_commands_too(module, tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", module], capture_output=True, text=True, cwd=ROOT, check=False
    )
    assert done.returncode == 2
    assert done.stderr.startswith("error: ") and len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize("name", ["demo", "files", "glue:mrpc", "glue:stsb,recommended"])
def test_a_configuration_is_found_by_name_from_any_directory(name, tmp_path, monkeypatch):
    file, *argument = name.split(":")
    from_a_clone = load_config(":".join([str(ROOT / "configs" / f"{file}.py"), *argument]))
    monkeypatch.chdir(tmp_path)
    assert load_config(name) == from_a_clone
    assert file in BUILT_IN


def test_a_file_of_the_user_may_have_the_name_of_a_configuration(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("demo.py").write_text(
        "from pabee_jax.training.config import TrainConfig\n"
        "def get_config():\n    return TrainConfig(task='demo', seed=7)\n"
    )
    assert load_config("demo.py").seed == 7
    assert load_config("demo").seed == 0


@dataclasses.dataclass(frozen=True)
class Settings:
    name: str = option("A name.", "")
    count: int | None = option("A count.")
    rate: float = option("A rate.", 0.5)
    fast: bool = option("Whether to be fast.", False)
    part: tuple[str, ...] = option("A part; may be given several times.", ())


def parsed(kind, *arguments):
    values = flags.FlagValues()
    define_flags(kind, values)
    values(["program", *arguments])
    return read_flags(kind, values)


def test_the_fields_of_a_dataclass_become_flags():
    assert parsed(Settings) == Settings()
    given = parsed(Settings, "--name=x", "--count=3", "--rate=1", "--fast", "--part=a", "--part=b")
    assert given == Settings("x", 3, 1.0, True, ("a", "b"))
    with pytest.raises(flags.IllegalFlagValueError):
        parsed(Settings, "--count=three")


def test_evaluate_reads_its_options_from_flags():
    options = parsed(EvaluateOptions, "--checkpoint=runs/x", "--patience=1,2", "--nosweep")
    assert options == EvaluateOptions(checkpoint="runs/x", patience="1,2")


def test_all_options_without_effect_are_named_together():
    with pytest.raises(InputError) as refused:
        EvaluateOptions(checkpoint="x", calibrate=True, sweep=True, time=True, perturbed="y")
    assert str(refused.value) == "--time, --sweep, --perturbed have no effect with --calibrate"
    with pytest.raises(InputError) as refused:
        EvaluateOptions(checkpoint="x", perturbed="y", sweep=True, max_drop=0.1, confidence=0.9)
    assert str(refused.value) == (
        "--sweep has no effect with --perturbed; "
        "--max_drop, --confidence have no effect without --calibrate"
    )


@pytest.mark.parametrize("name", ["coordinator", "num_processes", "process_id", "start_timeout"])
def test_train_refuses_options_of_several_processes_for_one(name):
    value = "localhost:1" if name == "coordinator" else 1
    with pytest.raises(InputError, match=f"--{name} has no effect without --multihost"):
        TrainOptions(workdir="runs/x", **{name: value})


CRITERION = """
import dataclasses
from pabee_jax.criteria import Criterion, registered

@registered("hunch")
@dataclasses.dataclass(frozen=True)
class Hunch(Criterion):
    strength: float
"""


@pytest.fixture
def plugin(tmp_path, own_criteria):
    """The file of a criterion "hunch"."""
    (tmp_path / "hunch.py").write_text(CRITERION)
    return str(tmp_path / "hunch.py")


@pytest.mark.parametrize("name", ["evaluate", "predict", "serve"])
def test_a_command_accepts_the_criterion_of_a_plugin(name, plugin):
    kind = pkgutil.resolve_name(f"pabee_jax.commands.{COMMANDS[name].options}")
    argv = [name, "--checkpoint=x", "--criterion=hunch:strength=2", f"--plugin={plugin}"]
    if name == "predict":
        argv += ["--input=x.csv", "--output=y.csv"]
    values = flags.FlagValues()
    command_line.define(kind, argv, values)
    command_line.parse(argv, values)
    options = read_flags(kind, values)
    criterion = options.settings[0] if name == "evaluate" else options.exit_criterion
    assert type(criterion).__name__ == "Hunch" and criterion.strength == 2


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "it must be a Python file, FILE.py"),
        ("x = 1\nx = y", "line 2: NameError: name 'y' is not defined"),
        ("x =", "line 1: SyntaxError: invalid syntax"),
        ("import sys\nsys.exit(3)", "line 2: SystemExit: 3"),
        ("import no_such_module", "line 1: ModuleNotFoundError: No module named 'no_such_module'"),
    ],
)
def test_a_plugin_that_cannot_be_used_is_refused_with_its_line(content, message, tmp_path):
    file = tmp_path / "mine.py"
    if content is not None:
        file.write_text(content)
    with pytest.raises(InputError) as refused:
        run_plugins([str(file)])
    assert str(refused.value) == f"--plugin {file}: {message}"

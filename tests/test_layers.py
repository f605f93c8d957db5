"""The folders of the package form layers, and importing the package is cheap."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_no_module_imports_from_a_folder_above_its_own():
    # In a process of its own: the linter closes the streams that pytest captures.
    code = "from importlinter.cli import lint_imports; exit(lint_imports(no_cache=True))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, f"an import goes up a layer, see pyproject.toml: {done.stdout}"


def test_the_root_of_the_package_holds_folders_only():
    files = {path.name for path in (ROOT / "pabee_jax").iterdir() if path.is_file()}
    assert files <= {"__init__.py", "errors.py", "py.typed"}


def test_importing_the_package_imports_no_library():
    code = "import sys, pabee_jax; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, check=True)
    libraries = {"jax", "flax", "transformers", "numpy", "orbax", "matplotlib"}
    assert not libraries & set(done.stdout.decode().split())


def test_a_folder_named_like_the_package_does_not_hide_the_installed_package(tmp_path):
    # The working directory is then the parent of a clone.
    (tmp_path / "pabee_jax").mkdir()
    code = "import pabee_jax; print(pabee_jax.__version__)"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, f"reinstall the package, as README.md says: {done.stderr}"


def test_only_reports_import_matplotlib():
    users = {
        path.parent.name
        for path in (ROOT / "pabee_jax").rglob("*.py")
        if "matplotlib" in path.read_text(encoding="utf-8")
    }
    assert users == {"reports"}

"""Loading with no import of sparsekit, and with a transformers that it was never tested with."""

from __future__ import annotations

import shutil
import tomllib
from pathlib import Path

import pytest

from sparsekit.runtime import versions
from tests.runtime.support import both
from tests.runtime.test_loading import python

ROOT = Path(__file__).parents[2]
LOAD = """
from transformers import AutoModelForCausalLM as A
model, info = A.from_pretrained({folder!r}, dtype="auto", output_loading_info=True)
assert not any(info.values()), info
print("loaded", sum(float(p.double().abs().sum()) for p in model.state_dict().values()))
"""


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    return both("llama", tmp_path_factory.mktemp("llama"))[1]


def test_autoload_needs_no_import(packed, tmp_path):
    """What `pip install ./autoload` puts beside the other packages is read by Python's own site module."""
    code = f"import site; site.addsitedir({str(tmp_path)!r})\n" + LOAD.format(folder=str(packed))
    status, output = python(code)
    assert status != 0
    assert "no file named model.safetensors" in output
    shutil.copy(ROOT / "autoload" / "sparsekit_autoload.pth", tmp_path)
    status, output = python(code)
    assert status == 0, output
    assert "loaded" in output


def test_autoload_without_sparsekit_says_nothing(tmp_path):
    shutil.copy(ROOT / "autoload" / "sparsekit_autoload.pth", tmp_path)
    code = (
        "import sys\nsys.path = [p for p in sys.path if 'python3' in p and 'site-packages' not in p]\nimport site\n"
        f"site.addsitedir({str(tmp_path)!r})\nassert 'sparsekit' not in sys.modules"
    )
    status, output = python(code, PYTHONPATH="", PYTHONSAFEPATH="1")
    assert (status, output) == (0, "")


def test_the_autoload_wheel_carries_the_file():
    project = tomllib.loads((ROOT / "autoload" / "pyproject.toml").read_text())
    (name,) = project["tool"]["hatch"]["build"]["targets"]["wheel"]["force-include"].values()
    assert (ROOT / "autoload" / name).is_file()
    main = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert main["optional-dependencies"]["autoload"] == [project["project"]["name"]]
    assert project["project"]["version"] == main["version"]


def test_the_range_is_the_one_that_pip_installs():
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    low, high = (".".join(map(str, version)) for version in (versions.LOWEST, versions.BELOW))
    assert f"transformers>={low},<{high.removesuffix('.0')}" in declared


@pytest.mark.parametrize(
    ("version", "works"),
    [("5.21.0", True), ("5.23.0", True), ("5.99.1.dev0", True), ("5.20.2", False), ("4.57.1", False), ("6.0.0", False)],
)
def test_supported(version, works):
    assert versions.supported(version) == works


@pytest.mark.parametrize("version", ["5.20.2", "6.0.0"])
@pytest.mark.parametrize("first", ["sparsekit", "transformers"])
def test_other_versions_are_refused(packed, version, first):
    lines = ["import sparsekit", f"import transformers; transformers.__version__ = {version!r}"]
    if first == "transformers":
        lines.reverse()
    status, output = python("\n".join(lines) + LOAD.format(folder=str(packed)))
    assert status != 0
    message = output.strip().splitlines()[-1]
    assert message.startswith("sparsekit.errors.VersionError"), output
    assert "5.21 up to, not including, 6" in message
    assert version in message
    assert "pip install 'transformers>=5.21,<6'" in message

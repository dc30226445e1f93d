"""Every command, recipe and program of the README runs as written, in a folder with a tiny model called my-model."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.support import tiny

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("readme")
    tiny.save("llama", folder / "my-model", max_position_embeddings=512)
    lines = [{"text": f"The {n} small boats came home before the storm, and nobody was hurt. " * 4} for n in range(60)]
    (folder / "text.jsonl").write_text("\n".join(json.dumps(line) for line in lines))
    for language, text in BLOCKS:
        first = text.splitlines()[0]
        if language == "yaml" and first.startswith("# my-"):
            (folder / first.removeprefix("# ")).write_text(text)
    return folder


def run(command, place):
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    done = subprocess.run(["bash", "-euc", command], cwd=place, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def test_the_readme_has_its_blocks():
    assert [language for language, _ in BLOCKS].count("bash") >= 6
    first = next(text for language, text in BLOCKS if language == "console")
    for command in first.split():
        script = ROOT / command
        assert os.access(script, os.X_OK)
        subprocess.run(["bash", "-n", script], check=True)


def test_every_command_block_runs_in_order(place):
    for language, text in BLOCKS:
        if language == "bash":
            run(text, place)
    for out in ("my-model-wanda-50", "mine", "my-model-2of4", "my-model-magnitude-30", "my-model-mine"):
        assert (place / out / "report.html").is_file(), out


def test_every_python_block_runs(place, tmp_path):
    # They load folders that command blocks make; under xdist another worker may have run those.
    dense = "--set save.format=dense"
    for out, more in (("my-model-wanda-50", ""), ("my-model-dense", dense), ("my-model-teal-40", dense)):
        run(f"[ -d {out} ] || sparsekit prune ./my-model -r magnitude-50 --no-evaluate {more} -o {out}", place)
    programs = [text for language, text in BLOCKS if language == "python"]
    assert len(programs) == 4
    for program in programs:
        (tmp_path / "program.py").write_text(program)
        run(f"python {tmp_path / 'program.py'}", place)


def test_the_workflow_runs(place):
    workflow = yaml.safe_load(next(text for language, text in BLOCKS if text.startswith("# .github")))
    steps = [step["run"] for step in workflow["jobs"]["prune"]["steps"] if "run" in step]
    commands = [step for step in steps if step.startswith("sparsekit")]
    assert len(commands) == len(steps) - 1
    for command in commands:
        run(command, place)
    assert json.loads((place / "evaluation.json").read_text())["missed_gates"] == []

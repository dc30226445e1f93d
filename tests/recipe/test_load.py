"""Loading: names, inheritance, overrides, round trip."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparsekit.errors import (
    PermissionRefused,
    RecipeReferenceError,
    RecipeSchemaError,
    RecipeSyntaxError,
    SparsekitError,
)
from sparsekit.recipe import PruneStage, Recipe, dump_yaml, load_recipe, recipe_from
from sparsekit.recipe.catalog import json_schema, shipped, trees
from sparsekit.recipe.load import merge
from sparsekit.recipe.yaml_positions import Mark, Node

HEAD = "sparsekit: 1\nname: mine\ndescription: a test\n"
STAGE = "stages:\n  - {stage: prune, method: wanda, sparsity: 0.5}\n"


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.chdir(tmp_path)

    def write(name: str, text: str) -> str:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        return name

    return write


# --- shipped -----------------------------------------------------------------------------------------------
def test_every_shipped_recipe_validates_and_is_what_its_name_says() -> None:
    paths = sorted(trees().recipes.glob("**/*.yaml"))
    assert len(paths) >= 7
    assert {info.path for info in shipped()} == set(paths)
    for path in paths:
        recipe = load_recipe(path.stem)
        assert recipe.name == path.stem
        assert len(path.read_text().splitlines()) <= 25
        assert len(recipe.description) <= 66  # one line of `sparsekit recipes`
        if of := re.search(r"-(\d+)of(\d+)", recipe.name):
            assert recipe.stages[0].pattern == f"{of[1]}:{of[2]}"
        elif recipe.name != "smoke":
            share = int(recipe.name.rpartition("-")[2].removeprefix("ppl")) / 100
            stage = recipe.stages[-1]
            if "ppl" in recipe.name:
                assert share == stage.budget.perplexity
                continue
            assert share in [getattr(recipe.stages[-1], key, None) for key in ("sparsity", "drop", "width", "params")]


def test_every_shipped_config_is_extended_by_a_recipe() -> None:
    configs = {path.resolve() for path in trees().configs.glob("**/*.yaml") if path.parent.name != "tasks"}
    assert len(configs) >= 3
    used = set()
    for path in [*trees().recipes.glob("*.yaml"), *configs]:
        for line in path.read_text().splitlines():
            if line.startswith("extends: "):
                used.add((path.parent / line.removeprefix("extends: ")).resolve())
    assert used == configs


@pytest.mark.parametrize("name", [path.stem for path in sorted(trees().recipes.glob("*.yaml"))])
def test_a_resolved_recipe_loads_back_to_itself(name: str, tmp_path: Path) -> None:
    recipe = load_recipe(name)
    (tmp_path / "copy.yaml").write_text(dump_yaml(recipe.resolved()))
    again = load_recipe(str(tmp_path / "copy.yaml"))
    assert again == recipe
    assert again.digest == recipe.digest
    assert recipe_from(recipe.resolved()) == recipe


def test_digest_changes_with_every_value() -> None:
    base = load_recipe("wanda-50")
    changes = [
        "stages.0.sparsity=0.6",
        "stages.0.group=linear",
        "stages.0.allocate=global_magnitude",
        "calibration.seed=1",
        "stages.0.ignore=['*.down_proj']",
        "gates.max_kl=0.1",
    ]
    digests = {load_recipe("wanda-50", [change]).digest for change in changes} | {base.digest}
    assert len(digests) == len(changes) + 1
    assert load_recipe("wanda-50", ["stages.0.group=row"]).digest == base.digest  # the default, said aloud


def test_unknown_shipped_name() -> None:
    with pytest.raises(RecipeReferenceError, match=r"Unknown recipe 'wanda50'\. Did you mean 'wanda-50'"):
        load_recipe("wanda50")


def test_a_name_that_is_a_file_here_gets_a_hint(write: Any) -> None:
    write("mine.yaml", HEAD + STAGE)
    with pytest.raises(RecipeReferenceError, match=r"For the file in this folder write mine\.yaml"):
        load_recipe("mine")


# --- stages ------------------------------------------------------------------------------------------------
def _stage(**keys: Any) -> PruneStage:
    stage = {"stage": "prune", "method": "wanda", "sparsity": 0.5, **keys}
    stage = {key: value for key, value in stage.items() if value is not None}
    return recipe_from({"sparsekit": 1, "name": "x", "description": "d", "stages": [stage]}).stages[0]


def test_options_of_the_method_stand_beside_the_keys_of_the_stage() -> None:
    assert _stage(method="wanda").method_options().group == "row"
    assert _stage(method="magnitude").method_options().group == "linear"
    stage = _stage(method="magnitude", group="row")
    assert type(stage.method_options()).__name__ == "MagnitudeOptions"
    assert stage.method_options().group == "row"
    name, options = _stage(allocate={"method": "global_magnitude"}).part("allocate")
    assert (name, type(options).__name__) == ("global_magnitude", "GlobalMagnitudeOptions")


@pytest.mark.parametrize(
    ("pattern", "sparsity", "result"),
    [("2:4", None, 0.5), ("1:4", None, 0.75), ("4:4", None, 0.0), ("1:4", 0.75, 0.75), ("1:3", 0.667, 2 / 3)],
)
def test_nm_patterns_imply_the_sparsity(pattern: str, sparsity: float | None, result: float) -> None:
    assert _stage(pattern=pattern, sparsity=sparsity).sparsity == pytest.approx(result, abs=1e-12)


# --- inheritance -------------------------------------------------------------------------------------------
def test_a_file_may_extend_shipped_recipes_and_configs_and_its_own_folder(write: Any) -> None:
    mine = write("mine.yaml", HEAD + "extends: wanda-50\ncalibration: {samples: 7}\n")
    recipe = load_recipe(mine)
    assert (recipe.calibration.samples, recipe.calibration.source) == (7, "c4")
    assert (recipe.name, recipe.stages) == ("mine", load_recipe("wanda-50").stages)
    write("mine.yaml", HEAD + "extends: configs/calibration/builtin.yaml\n" + STAGE)
    assert load_recipe(mine).calibration.source == "builtin"
    write("parts/base.yaml", "sparsekit: 1\nextends: ../all.yaml\n" + STAGE)
    write("all.yaml", "sparsekit: 1\ncalibration: {seed: 5}\n")
    write("mine.yaml", HEAD + "extends: parts/base.yaml\n")
    assert load_recipe(mine).calibration.seed == 5


@pytest.mark.parametrize("name", [path.stem for path in sorted(trees().recipes.glob("*.yaml"))])
def test_every_shipped_recipe_leaves_room_for_one_more_level(write: Any, name: str) -> None:
    assert load_recipe(write("mine.yaml", HEAD + f"extends: {name}\n")).stages == load_recipe(name).stages


def test_name_and_description_are_not_inherited(write: Any) -> None:
    mine = write("mine.yaml", "sparsekit: 1\nextends: wanda-50\n")
    with pytest.raises(RecipeSchemaError) as caught:
        load_recipe(mine)
    assert [line.split(" (")[0] for line in str(caught.value).splitlines()] == [
        "mine.yaml:1:1: missing key 'name'",
        "mine.yaml:1:1: missing key 'description'",
    ]


@pytest.mark.parametrize(
    ("extends", "message"),
    [
        ("../other.yaml", "mine.yaml:4:10: extends: '../other.yaml' leaves the folder of the recipe"),
        ("/etc/passwd", "mine.yaml:4:10: extends: '/etc/passwd' leaves the folder of the recipe"),
        ("configs/../../x.yaml", "mine.yaml:4:10: extends: 'configs/../../x.yaml' leaves the folder"),
        ("link.yaml", "mine.yaml:4:10: extends: 'link.yaml' leaves the folder of the recipe"),
        ("absent.yaml", "mine.yaml:4:10: extends: there is no file 'absent.yaml'"),
        (
            "configs/defalts.yaml",
            "mine.yaml:4:10: extends: there is no file 'configs/defalts.yaml'; did you mean",
        ),
        ("wanda50", "mine.yaml:4:10: Unknown recipe 'wanda50'. Did you mean 'wanda-50'?"),
        ("mine.yaml", "mine.yaml:4:10: extends: mine.yaml extends itself"),
        ("[a]", "mine.yaml:4:10: extends: must be the name or path of one parent recipe"),
        ("3", "mine.yaml:4:10: extends: must be the name or path of one parent recipe"),
    ],
)
def test_parents_that_may_not_be_used(write: Any, tmp_path: Path, extends: str, message: str) -> None:
    (tmp_path / "inside").mkdir()
    (tmp_path / "other.yaml").write_text("sparsekit: 1\n")
    (tmp_path / "inside" / "link.yaml").symlink_to(tmp_path / "other.yaml")
    (tmp_path / "inside" / "mine.yaml").write_text(HEAD + f"extends: {extends}\n" + STAGE)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path / "inside")
        with pytest.raises(SparsekitError) as caught:
            load_recipe("mine.yaml")
    assert str(caught.value).startswith(message)
    assert caught.value.exit_code == 2


def test_cycles_and_long_chains_are_refused(write: Any) -> None:
    write("a.yaml", HEAD + "extends: b.yaml\n")
    write("b.yaml", "sparsekit: 1\nextends: a.yaml\n")
    with pytest.raises(RecipeReferenceError, match=r"b\.yaml:2:10: extends: a\.yaml extends itself"):
        load_recipe("a.yaml")
    write("p0.yaml", HEAD + "extends: p1.yaml\n" + STAGE)
    for number in range(1, 5):
        write(f"p{number}.yaml", f"sparsekit: 1\nextends: p{number + 1}.yaml\n")
    with pytest.raises(RecipeReferenceError, match=r"p3\.yaml:2:10: extends: more than 3 parents in a row"):
        load_recipe("p0.yaml")
    write("p3.yaml", "sparsekit: 1\n")
    assert load_recipe("p0.yaml").name == "mine"


def test_problems_name_the_file_they_are_in(write: Any) -> None:
    mine = write("mine.yaml", HEAD + "extends: base.yaml\n" + STAGE + "save: {valus: raw}\n")
    write("base.yaml", "sparsekit: 1\ncalibration:\n  sampels: 4\nsave: {format: sparse}\n")
    with pytest.raises(RecipeSchemaError) as caught:
        load_recipe(mine)
    assert str(caught.value).splitlines() == [
        "base.yaml:3:3: calibration: unknown key 'sampels'; did you mean 'samples'?",
        "base.yaml:4:16: save.format: must be one of auto, dense, bitmask, nm, block, got 'sparse'",
        "mine.yaml:7:8: save: unknown key 'valus'; did you mean 'values'?",
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("name: x\n", "mine.yaml:1:1: missing key 'sparsekit' (1)"),
        ("sparsekti: 1\n", "mine.yaml:1:1: missing key 'sparsekit' (1); line 1 says 'sparsekti'"),
        (
            "sparsekit: 2\n",
            "mine.yaml:1:12: sparsekit: must be 1, the version of the recipe schema, got 2. Upgrade",
        ),
        (
            "sparsekit: true\n",
            "mine.yaml:1:12: sparsekit: must be 1, the version of the recipe schema, got True",
        ),
        (
            "sparsekit: one\n",
            "mine.yaml:1:12: sparsekit: must be 1, the version of the recipe schema, got 'one'",
        ),
    ],
)
def test_schema_version(write: Any, text: str, message: str) -> None:
    with pytest.raises(RecipeSchemaError) as caught:
        load_recipe(write("mine.yaml", text))
    assert str(caught.value).startswith(message)


def test_a_file_that_may_not_be_read(write: Any) -> None:
    write("mine.yaml", HEAD + STAGE)
    script = (
        "import os, sys\n"
        "from sparsekit.errors import PermissionRefused\n"
        "from sparsekit.recipe import load_recipe\n"
        "os.chmod('mine.yaml', 0)\n"
        "if os.geteuid() == 0: os.setresuid(65534, 65534, 65534)\n"
        "try: load_recipe('mine.yaml')\n"
        "except PermissionRefused as error: print(error); sys.exit(error.exit_code)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == PermissionRefused.exit_code, done.stderr
    assert done.stdout.startswith("mine.yaml: may not be read")


_LEAF = st.integers(0, 5) | st.lists(st.integers(0, 3), max_size=2)
_TREE = st.recursive(
    st.dictionaries(st.sampled_from("abcd"), _LEAF, max_size=4),
    lambda inner: st.dictionaries(st.sampled_from("abcd"), _LEAF | inner, max_size=4),
    max_leaves=12,
)


def _node(data: Any) -> Node:
    mark = Mark("t")
    if isinstance(data, dict):
        return Node({key: _node(value) for key, value in data.items()}, mark)
    return Node([_node(value) for value in data] if isinstance(data, list) else data, mark)


def _leaves(data: Any, path: tuple[str, ...] = ()) -> dict[tuple[str, ...], Any]:
    if not isinstance(data, dict):
        return {path: data}
    return {key: value for step, child in data.items() for key, value in _leaves(child, (*path, step)).items()}


def _merged(*trees_: Any) -> Any:
    result = _node(trees_[0])
    for tree in trees_[1:]:
        result = merge(result, _node(tree))
    return result.data()


@given(_TREE, _TREE)
def test_merge_laws(parent: Any, child: Any) -> None:
    both = _merged(parent, child)
    assert _merged(child, {}) == _merged({}, child) == child
    assert _merged(child, child) == child
    assert _merged(both, child) == both  # the child has had its say
    assert both.keys() == parent.keys() | child.keys()
    leaves, before, said = _leaves(both), _nodes(parent), _nodes(child)
    for path, value in _leaves(child).items():
        assert leaves[path] == value  # everything the child says holds; lists whole
    for path, value in _leaves(parent).items():
        prefixes = [path[:length] for length in range(1, len(path) + 1)]
        touched = any(p in said and not isinstance(before[p], dict) for p in prefixes) or any(
            p in said and not isinstance(said[p], dict) for p in prefixes
        )
        assert touched or leaves[path] == value  # everything the child does not touch stays


@given(_TREE, _TREE, _TREE)
def test_merging_level_by_level_equals_merging_the_chain(a: Any, b: Any, c: Any) -> None:
    """Associative wherever no level changes the kind of a key (a mapping in one, a value in another)."""
    kinds: dict[tuple[str, ...], set[bool]] = {}
    for tree in (a, b, c):
        for path, value in _nodes(tree).items():
            kinds.setdefault(path, set()).add(isinstance(value, dict))
    if all(len(kind) == 1 for kind in kinds.values()):
        assert _merged(_merged(a, b), c) == _merged(a, _merged(b, c))


def _nodes(data: Any, path: tuple[str, ...] = ()) -> dict[tuple[str, ...], Any]:
    found = {path: data}
    for step, child in data.items() if isinstance(data, dict) else ():
        found.update(_nodes(child, (*path, step)))
    return found


# --- overrides ---------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("override", "read", "value"),
    [
        ("stages.0.sparsity=0.6", lambda r: r.stages[0].sparsity, 0.6),
        ("stages.0.pattern=2:4", lambda r: r.stages[0].pattern, "2:4"),
        (
            "stages.0.targets=['*.mlp.*', 're:.*q_proj']",
            lambda r: r.stages[0].targets,
            ("*.mlp.*", "re:.*q_proj"),
        ),
        ("calibration.source=text.jsonl", lambda r: r.calibration.source, "text.jsonl"),
        ("calibration.source=*.jsonl", lambda r: r.calibration.source, "*.jsonl"),
        ("calibration.source=a=b.txt", lambda r: r.calibration.source, "a=b.txt"),
        ('calibration.source="007"', lambda r: r.calibration.source, "007"),
        ("calibration.sequence_length=", lambda r: r.calibration.sequence_length, None),
        ("gates.max_perplexity_ratio=1.25", lambda r: r.gates.max_perplexity_ratio, 1.25),
        ("gates.min_metrics.arc_easy/acc=0.5", lambda r: r.gates.min_metrics, {"arc_easy/acc": 0.5}),
        (
            "stages.0.allocate={method: global_magnitude}",
            lambda r: r.stages[0].part("allocate")[0],
            "global_magnitude",
        ),
        ("stages.0.method=magnitude", lambda r: r.stages[0].method_options().group, "linear"),
        ("save={}", lambda r: r.save.format, "auto"),
    ],
)
def test_override(override: str, read: Any, value: Any) -> None:
    assert read(load_recipe("wanda-50", [override])) == value


def test_later_overrides_win() -> None:
    recipe = load_recipe("wanda-50", ["stages.0.sparsity=0.6", "stages.0.sparsity=0.7"])
    assert recipe.stages[0].sparsity == 0.7


OVERRIDE_ERRORS = {
    "stages.0.sparsty=1": "--set stages.0.sparsty: stages.0: unknown key 'sparsty'; did you mean 'sparsity'?",
    "calibraton.source=x": "--set calibraton.source: unknown key 'calibraton'; did you mean 'calibration'?",
    "stages.0.sparsity=1.7": "--set stages.0.sparsity: must be a number from 0 to 1, got 1.7",
    "stages.0.sparsity=half": "--set stages.0.sparsity: must be a number from 0 to 1, got 'half'",
    "stages.0.sparsity=.nan": "--set stages.0.sparsity: '.nan': .nan is not a finite number",
    "stages.0.sparsity=1e999": "--set stages.0.sparsity: '1e999': 1e999 is not a finite number",
    "stages.1.sparsity=1": "--set stages.1.sparsity: stages has no entry '1'; use 0",
    "stages.x.sparsity=1": "--set stages.x.sparsity: stages has no entry 'x'; use 0",
    "stages.-1.sparsity=1": "--set stages.-1.sparsity: stages has no entry '-1'; use 0",
    "name.x=1": "--set name.x: name is 'wanda-50', which has no key 'x'",
    "stages.0.targets=[a": "--set stages.0.targets: '[a': expected ',' or ']', but got '<stream end>'",
    "stages.0.targets=[1]": "--set stages.0.targets: stages.0.targets.0: must be text, got 1",
    "stages.0.method=wnada": "--set stages.0.method: Unknown pruner 'wnada'. Did you mean 'wanda'?",
    "stages.0.allocate=unifrm": "--set stages.0.allocate: Unknown allocator 'unifrm'. Did you mean",
    "stages.0.allocate.method=x": "--set stages.0.allocate.method: Unknown allocator 'x'. Available:",
    "extends=x": "--set extends: extends cannot be overridden",
    "sparsekit=1": "--set sparsekit: sparsekit cannot be overridden",
    "x": "--set needs KEY=VALUE, got 'x'",
    "=1": "--set needs KEY=VALUE, got '=1'",
    "a..b=1": "--set needs KEY=VALUE, got 'a..b=1'",
    "calibration.source=a\x00b": "--set calibration.source: 'a\\x00b': character '\\x00' is not allowed",
}


@pytest.mark.parametrize("override", OVERRIDE_ERRORS)
def test_override_errors(override: str) -> None:
    with pytest.raises((RecipeReferenceError, RecipeSchemaError, RecipeSyntaxError)) as caught:
        load_recipe("wanda-50", [override])
    assert str(caught.value).startswith(OVERRIDE_ERRORS[override])
    assert "\n" not in str(caught.value)


# --- schema for editors ------------------------------------------------------------------------------------
def test_editor_schema_knows_every_method_and_its_options() -> None:
    schema = json_schema()
    stages = [
        schema["$defs"][item["$ref"].rpartition("/")[2]] for item in schema["properties"]["stages"]["items"]["anyOf"]
    ]
    by_method = {stage["properties"]["method"]["const"]: stage for stage in stages}
    assert {"magnitude", "random", "wanda"} <= by_method.keys()
    assert by_method["wanda"]["properties"]["group"]["enum"] == ["row", "linear"]
    assert by_method["wanda"]["additionalProperties"] is False
    assert "sparsity" not in by_method["wanda"]["required"]
    assert "global_magnitude" in by_method["wanda"]["properties"]["allocate"]["anyOf"][0]["enum"]
    assert set(schema["properties"]) == {*Recipe.model_fields, "extends"}

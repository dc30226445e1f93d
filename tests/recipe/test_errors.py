"""F17: every key that shipped recipes have misspelt once, every required one removed once; texts of messages."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, ClassVar, Literal

import pytest
import yaml

from sparsekit import registry
from sparsekit.contracts import LayerPruner, MethodOptions
from sparsekit.errors import PluginBroken, RecipeSchemaError, SparsekitError
from sparsekit.recipe import dump_yaml, load_recipe, recipe_from
from sparsekit.recipe.catalog import shipped_files
from sparsekit.recipe.stages import PARTS, stage_model

PRUNERS = ", ".join(registry.names("pruners"))
HEAD = "sparsekit: 1\nname: mine\ndescription: a test\n"


def _refusal(text: str, tmp_path: Path) -> str:
    path = tmp_path / "r.yaml"
    path.write_text(text)
    with pytest.raises(SparsekitError) as caught:
        load_recipe(str(path))
    assert caught.value.exit_code == 2
    return str(caught.value).replace(f"{tmp_path}/", "")


def _keys(node: yaml.Node, path: str = "") -> list[tuple[str, str, int, int]]:
    """Return (parent path, key, line, column) of every key, found by PyYAML's own composer."""
    found = []
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            found.append((path, key.value, key.start_mark.line + 1, key.start_mark.column + 1))
            found += _keys(value, f"{path}.{key.value}" if path else key.value)
    elif isinstance(node, yaml.SequenceNode):
        for number, value in enumerate(node.value):
            found += _keys(value, f"{path}.{number}")
    return found


def _cases() -> list[Any]:
    """Return every key of every shipped recipe: each key of a method, or of the recipe itself, once."""
    cases, seen = [], set()
    for name in shipped_files():
        recipe = load_recipe(name).resolved()
        text = dump_yaml(recipe)  # every key there is, options and defaults included
        for path, key, line, column in _keys(yaml.compose(text)):
            stage, _, inner = path.removeprefix("stages.").partition(".")
            methods = json.dumps(_methods(recipe["stages"][int(stage)])) if path.startswith("stages.") else ""
            if (identity := (methods, inner if methods else path, key)) not in seen:
                seen.add(identity)
                cases.append(pytest.param(text, path, key, line, column, id=f"{name}:{path}.{key}"))
    return cases


def _methods(stage: dict[str, Any]) -> list[Any]:
    """Return the names of all methods of a stage."""
    parts = (stage.get(room) for room in PARTS)
    return [stage["method"], *(part["method"] if isinstance(part, dict) else part for part in parts)]


CASES = _cases()
REQUIRED = {"sparsekit", "name", "description", "stages", "stage", "method", "sparsity"}


def test_there_are_many_cases() -> None:
    assert len(CASES) >= 400


@pytest.mark.parametrize(("text", "path", "key", "line", "column"), CASES)
def test_a_misspelt_key_is_found_at_its_position(
    text: str, path: str, key: str, line: int, column: int, tmp_path: Path
) -> None:
    wrong = key[:-2] + key[-1] + key[-2] if key[-1] != key[-2] else key + "x"
    lines = text.splitlines()
    row = lines[line - 1]
    assert row[column - 1 :].startswith(f"{key}:")
    lines[line - 1] = row[: column - 1] + wrong + row[column - 1 + len(key) :]
    message = _refusal("\n".join(lines) + "\n", tmp_path)
    if key == "sparsekit":
        assert message == f"r.yaml:1:1: missing key 'sparsekit' (1); line 1 says {wrong!r}"
        return
    prefix = f"{path}: " if path else ""
    assert message == f"r.yaml:{line}:{column}: {prefix}unknown key {wrong!r}; did you mean {key!r}?"


@pytest.mark.parametrize(
    ("text", "path", "key", "line", "column"), [case for case in CASES if case.values[2] in REQUIRED]
)
def test_a_missing_key_is_reported_at_its_mapping(
    text: str, path: str, key: str, line: int, column: int, tmp_path: Path
) -> None:
    data = yaml.safe_load(text)
    _, stage, part = (*path.split(".", 2), "", "")[:3]
    if part == "allocate":
        return  # an allocation without a name is uniform
    parent = data["stages"][int(stage)] if path else data
    pattern = parent.get("pattern", "")
    if part:
        parent = parent[part]
    del parent[key]
    if key == "sparsity" and ":" in pattern:
        path_ = tmp_path / "r.yaml"
        path_.write_text(dump_yaml(data))
        keep, of = map(int, pattern.split(":"))
        assert load_recipe(str(path_)).stages[int(stage)].sparsity == 1 - keep / of  # implied
        return
    if key == "sparsity" and parent.get("stage") == "activations":
        if parent["budget"]:
            return  # its sparsity was null
        assert "stages." in (told := _refusal(dump_yaml(data), tmp_path))
        assert told.endswith("needs either sparsity or budget; neither is given")
        return
    changed = dump_yaml(data)
    message = _refusal(changed, tmp_path).splitlines()
    if path:
        rows = list(enumerate(changed.splitlines(), 1))
        row = [number for number, text_ in rows if text_.startswith("- ")][int(stage)]
        if part:
            row = next(number for number, text_ in rows[row:] if text_.startswith(f"  {part}:"))
        place = f"{row + 1}:5" if part else f"{row}:3"
        assert message[0].startswith(f"r.yaml:{place}: {path}: missing key {key!r}")
    else:
        assert message[0].startswith(f"r.yaml:1:1: missing key {key!r}")
    assert len(message) == 1


STAGE_ERRORS = {
    "sparsity: half": "stages.0.sparsity: must be a number from 0 to 1, got 'half'",
    "sparsity: 1.7": "stages.0.sparsity: must be a number from 0 to 1, got 1.7",
    "sparsity: -0.1": "stages.0.sparsity: must be a number from 0 to 1, got -0.1",
    "sparsity: true": "stages.0.sparsity: must be a number from 0 to 1, got true",
    "sparsity: null": "stages.0.sparsity: must be a number from 0 to 1, got null",
    "sparsity: '0.5'": "stages.0.sparsity: must be a number from 0 to 1, got '0.5'",
    "sparsity: [0.5]": "stages.0.sparsity: must be a number from 0 to 1, got a list",
    "sparsity: .nan": ".nan is not a finite number",
    "sparsity: 1e999": "1e999 is not a finite number",
    "sparsity: 0.5, pattern: 2:x": "stages.0.pattern: unknown pattern '2:x'; use unstructured, N:M such as 2:4 "
    "(keep 2 of 4), or RxC such as 4x1",
    "sparsity: 0.5, pattern: 0:4": "stages.0.pattern: pattern 0:4 keeps 0 of 4; need 1 <= N <= M",
    "sparsity: 0.6, pattern: 2:4": "stages.0.sparsity: sparsity 0.6 disagrees with pattern 2:4, which keeps 2 of "
    "every 4 weights: sparsity 0.5; write that or leave it out",
    "sparsity: 0.5, group: rows": "stages.0.group: must be one of row, linear, got 'rows'; did you mean 'row'?",
    "sparsity: 0.5, allocate: 3": "stages.0.allocate: must be the allocator's name, or a mapping with method and "
    "its options",
    "sparsity: 0.5, allocate: {method: uniform, x: 1}": "stages.0.allocate: unknown key 'x'; known keys: method",
    "sparsity: 0.5, targets: mlp": "stages.0.targets: must be a list, got 'mlp'",
    "sparsity: 0.5, targets: ['re:(']": "stages.0.targets: 're:(' is not a regular expression: missing ), "
    "unterminated subpattern at position 0",
    "sparsity: 0.5, ignore: ['']": "stages.0.ignore: an entry is empty; write a glob such as *.mlp.* or re: and "
    "a regular expression",
    "sparsity: 0.5, overrides: {'*.k_proj': 2}": "stages.0.overrides.*.k_proj: must be a number from 0 to 1, got 2",
    "sparsity: 0.5, overrides: {'*.k_proj': dense}": "stages.0.overrides.*.k_proj: must be a number from 0 to 1, "
    "got 'dense'",
    "sparsity: 0.5, overrides: {'re:(': 0}": "stages.0.overrides: 're:(' is not a regular expression: missing ), "
    "unterminated subpattern at position 0",
    "sparsity: 0.5, overrides: {'': 0}": "stages.0.overrides: an entry is empty; write a glob such as *.mlp.* or "
    "re: and a regular expression",
    "sparsity: 0.5, overrides: ['*.k_proj']": "stages.0.overrides: must be a mapping of keys to values, got a list",
    "sparsity: 0.5, allocate: {method: erk, max_density: 2}": "stages.0.allocate.max_density: must be a number from 0 "
    "to 1, got 2",
    "sparsity: 0.5, allocate: {method: sap, p: 2}": "stages.0.allocate: p 2 must be below q 1",
    "sparsity: 0.5, min_coverage: 2": "stages.0.min_coverage: must be a number from 0 to 1, got 2",
    "sparsity: 0.5, propagate: blok": "stages.0.propagate: must be one of block, none, got 'blok'; did you mean "
    "'block'?",
}


@pytest.mark.parametrize("keys", STAGE_ERRORS)
def test_texts_for_wrong_values_in_a_stage(keys: str, tmp_path: Path) -> None:
    text = HEAD + f"stages:\n  - {{stage: prune, method: wanda, {keys}}}\n"
    message = _refusal(text, tmp_path)
    assert message.startswith("r.yaml:5:")
    assert message.split(": ", 1)[1] == STAGE_ERRORS[keys]


ERRORS = {
    "stages: []": "r.yaml:4:9: stages: must be a list of at least one entry, got an empty list",
    "stages: 3": "r.yaml:4:9: stages: must be a list of at least one entry, got 3",
    "stages: [3]": "r.yaml:4:10: stages.0: must be a mapping of keys to values",
    "stages: [{stage: prun, method: wanda, sparsity: 1}]": "r.yaml:4:18: stages.0.stage: must be reshape, prune or "
    "activations, got 'prun'; did you mean 'prune'?",
    "stages: [{stage: prune, method: [wanda], sparsity: 1}]": "r.yaml:4:33: stages.0.method: must be text, got a list",
    "stages: [{stage: prune, method: wnada, sparsity: 1, group: row}]": "r.yaml:4:33: stages.0.method: Unknown "
    f"pruner 'wnada'. Did you mean 'wanda'? Available: {PRUNERS}",
    "stages: [{stage: prune, metod: wanda, sparsity: 1}]": "r.yaml:4:25: stages.0: unknown key 'metod'; did you "
    "mean 'method'?",
}


@pytest.mark.parametrize("stages", ERRORS)
def test_texts_for_stages(stages: str, tmp_path: Path) -> None:
    assert _refusal(HEAD + stages + "\n", tmp_path) == ERRORS[stages]


OTHER_ERRORS = {
    "calibration: {samples: 0}": "5:24: calibration.samples: must be a whole number of at least 1, got 0",
    "calibration: {samples: 1.0}": "5:24: calibration.samples: must be a whole number of at least 1, got 1.0",
    "calibration: {sequence_length: 4}": "5:32: calibration.sequence_length: must be a whole number of at least 8 "
    "or null, got 4",
    "calibration: {seed: -1}": "5:21: calibration.seed: must be a whole number of at least 0, got -1",
    "calibration: {source: 3}": "5:23: calibration.source: must be text, got 3",
    "calibration: c4": "5:14: calibration: must be a mapping of keys to values, got 'c4'",
    "evaluate: {tasks: [1]}": "5:20: evaluate.tasks.0: must be text, got 1",
    "save: {format: dens}": (
        "5:16: save.format: must be one of auto, dense, bitmask, nm, block, got 'dens'; did you mean 'dense'?"
    ),
    "gates: {max_kl: x}": "5:17: gates.max_kl: must be a number of at least 0 or null, got 'x'",
    "gates: {max_perplexity_ratio: 0}": "5:31: gates.max_perplexity_ratio: must be a number above 0 or null, got 0",
    "gates: {min_metrics: {acc: 1}}": "5:22: gates.min_metrics: key 'acc' must be task/metric, such as arc_easy/acc",
    "gates: {min_metrics: {a/b: x}}": "5:28: gates.min_metrics.a/b: must be a number, got 'x'",
    "gaets: {}": "5:1: unknown key 'gaets'; did you mean 'gates'?",
    "zzz: {}": "5:1: unknown key 'zzz'; known keys: sparsekit, name, description, calibration, stages, save, "
    "evaluate, gates, extends",
}


@pytest.mark.parametrize("part", OTHER_ERRORS)
def test_texts_outside_stages(part: str, tmp_path: Path) -> None:
    text = HEAD + "stages: [{stage: prune, method: wanda, sparsity: 0.5}]\n" + part + "\n"
    assert _refusal(text, tmp_path) == f"r.yaml:{OTHER_ERRORS[part]}"


@pytest.mark.parametrize("name", ["../../x", "a/b", "", ".hidden", "a b", "x" * 65, "a\\nb"])
def test_names_that_cannot_be_folders(name: str, tmp_path: Path) -> None:
    text = (HEAD + "stages: [{stage: prune, method: wanda, sparsity: 0.5}]\n").replace("mine", f'"{name}"')
    message = _refusal(text, tmp_path)
    assert message.startswith("r.yaml:2:7: name: must be letters, digits, dot, dash and underscore, at most 64, got")


def test_all_problems_of_a_file_are_told_at_once(tmp_path: Path) -> None:
    text = (
        "sparsekit: 1\nname: mine\nstages:\n"
        "  - {stage: prune, method: wanda, sparsity: 1.7, grop: row}\n"
        "  - {stage: prune, method: nothing, sparsity: half, ingore: []}\n"
        "save: {format: zip}\n"
    )
    assert _refusal(text, tmp_path).splitlines() == [
        "r.yaml:1:1: missing key 'description' (one line)",
        "r.yaml:4:45: stages.0.sparsity: must be a number from 0 to 1, got 1.7",
        "r.yaml:4:50: stages.0: unknown key 'grop'; did you mean 'group'?",
        f"r.yaml:5:28: stages.1.method: Unknown pruner 'nothing'. Available: {PRUNERS}",
        "r.yaml:5:47: stages.1.sparsity: must be a number from 0 to 1, got 'half'",
        "r.yaml:5:53: stages.1: unknown key 'ingore'; did you mean 'ignore'?",
        "r.yaml:6:16: save.format: must be one of auto, dense, bitmask, nm, block, got 'zip'",
    ]


# --- third-party methods -----------------------------------------------------------------------------------
class _Options(MethodOptions):
    damp: float = 0.01
    blocks: tuple[int, ...] = (1, 2)
    kind: Literal["a", "b"] | int = "a"


class _Foreign(LayerPruner[_Options]):
    options_type: ClassVar[type[MethodOptions]] = _Options

    def fit(self, linear: Any, weight: Any, stats: Any) -> Any:
        raise NotImplementedError


@pytest.fixture
def foreign(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Offer `foreign` as an entry point would."""
    load, names, source = registry.load, registry.names, registry.source
    monkeypatch.setattr(registry, "load", lambda r, n: _Foreign if n == "foreign" else load(r, n))
    monkeypatch.setattr(registry, "names", lambda r: (*names(r), "foreign") if r == "pruners" else names(r))
    monkeypatch.setattr(registry, "source", lambda r, n: "other 1.0" if n == "foreign" else source(r, n))
    stage_model.cache_clear()
    yield _Foreign
    stage_model.cache_clear()


def _foreign_recipe(**options: Any) -> Any:
    stage = {"stage": "prune", "method": "foreign", "sparsity": 0.5, **options}
    return recipe_from({"sparsekit": 1, "name": "x", "description": "d", "stages": [stage]})


def test_options_of_a_foreign_method_are_checked_like_our_own(foreign: Any) -> None:
    options = _foreign_recipe(damp=0.5, blocks=[3], kind=7).stages[0].method_options()
    assert options == _Options(damp=0.5, blocks=(3,), kind=7)
    assert _foreign_recipe().resolved()["stages"][0]["blocks"] == [1, 2]
    with pytest.raises(RecipeSchemaError) as caught:
        _foreign_recipe(damp="x", bloks=[1], kind=[], blocks=["y"])
    assert sorted(str(caught.value).splitlines()) == [
        "recipe: stages.0.blocks.0: must be a whole number, got 'y'",
        "recipe: stages.0.damp: must be a number, got 'x'",
        "recipe: stages.0.kind: must be one of a, b or a whole number, got an empty list",
        "recipe: stages.0: unknown key 'bloks'; did you mean 'blocks'?",
    ]


@pytest.mark.parametrize("clash", ["sparsity", "method_options", "model_dump"])
def test_an_option_that_hides_a_key_of_the_stage_is_a_broken_plugin(
    foreign: Any, monkeypatch: pytest.MonkeyPatch, clash: str
) -> None:
    fields = {**_Options.model_fields, clash: _Options.model_fields["damp"]}
    broken = type("Broken", (), {"model_fields": fields})
    monkeypatch.setattr(_Foreign, "options_type", broken)
    with pytest.raises(PluginBroken, match=f"pruner 'foreign' of other 1.0 has an option '{clash}'"):
        _foreign_recipe()

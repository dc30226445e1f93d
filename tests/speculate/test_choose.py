"""Choosing what to leave out, and keeping the choice."""

from __future__ import annotations

import json
from contextlib import nullcontext

import pytest
import torch

from sparsekit.errors import CheckpointError, UnsupportedFamily, UsageError
from sparsekit.models.source import open_model
from sparsekit.progress import Silent
from sparsekit.speculate import skip_file
from sparsekit.speculate.choose import choose, expected_speed, tries
from sparsekit.speculate.skip_file import SkipSet
from sparsekit.speculate.skipping import Skipper, Skips
from tests.speculate.support import model
from tests.support import tiny

IDS = tiny.ids(3, 20)


def search(made, *, changes=30, seed=0, advance=lambda: None):
    return choose(made, Skipper(made), IDS, changes=changes, seed=seed, full=nullcontext, advance=advance)


def agreement(made, skips):
    with torch.no_grad():
        full = made(input_ids=IDS).logits.argmax(-1)
        with Skipper(made).skipping(skips)():
            return float((made(input_ids=IDS).logits.argmax(-1) == full).double().mean())


def test_the_agreement_is_that_of_the_set_and_changes_never_lower_it():
    made = model("llama", blocks=7, branches=0.03)
    found = [search(made, changes=changes) for changes in (0, 40)]
    for choice in found:
        assert choice.agreement == agreement(made, choice.skips)
    assert found[0].agreement < found[1].agreement
    assert len(found[0].skips) == len(found[1].skips)
    assert found[1].agreement > agreement(made, Skips((1, 3, 5), (1, 3, 5)))


def test_a_branch_that_does_nothing_is_found():
    made = model("llama", blocks=6, branches=1.0)
    with torch.no_grad():
        for block in (2, 4):
            made.model.layers[block].mlp.down_proj.weight.zero_()
        made.model.layers[3].self_attn.o_proj.weight.zero_()
    found = search(made, changes=0)
    assert found.agreement == 1.0
    assert found.speed > 1
    assert found.skips == Skips((3,), (2, 4))


def test_the_choice_follows_its_seed_and_counts_its_tries():
    made = model("llama", blocks=8, branches=0.03)
    counted = []
    found = [search(made, seed=seed, advance=lambda: counted.append(1)) for seed in (1, 1, 2)]
    assert found[0] == found[1] != found[2]
    assert len(counted) == 3 * found[0].tries == 3 * tries(8, 30)


def test_two_blocks_leave_nothing_to_choose():
    with pytest.raises(UnsupportedFamily, match=r"2 blocks.*nothing to leave out"):
        search(model("llama", blocks=2))


def test_expected_speed():
    assert expected_speed(0.0, 0.5) == pytest.approx(1 / 1.5)
    assert expected_speed(1.0, 0.5) == pytest.approx(26 / 13.5)
    assert expected_speed(0.6, 0.5) == pytest.approx(max(1.6 / 1.5, 1.96 / 2, 2.176 / 2.5))


def test_the_cost_counts_weights_that_a_token_reads():
    made = model("llama", blocks=4, tie_word_embeddings=False)
    skipper = Skipper(made)
    layer = made.model.layers[1]
    attention, mlp = (sum(p.numel() for p in part.parameters()) for part in (layer.self_attn, layer.mlp))
    read = sum(p.numel() for name, p in made.named_parameters() if "embed" not in name) + sum(
        b.numel() for b in made.buffers()
    )
    assert skipper.cost(Skips()) == 1
    assert skipper.cost(Skips((1, 2), (2,))) == pytest.approx(1 - (2 * attention + mlp) / read)


# --- files -------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny.save("llama", tmp_path_factory.mktemp("skip") / "model", num_hidden_layers=5)


def stored(path, model_id, **changes):
    made = {
        "schema": 1, "model": model_id, "blocks": 5, "attention": [1, 3], "mlp": [2], "agreement": 0.75,
        "text": "words", "tokens": 60, "tries": 40, "seed": 0, **changes,
    }  # fmt: skip
    path.write_text(json.dumps({entry: value for entry, value in made.items() if value is not ...}))
    return path


def test_a_skip_set_is_read_as_it_was_written(folder, tmp_path):
    model_id = skip_file.fingerprint(open_model(str(folder), Silent()))
    found = SkipSet(model_id, 5, (1, 3), (2,), 0.75, "words", 60, 40, 0)
    skip_file.write(tmp_path / "skip.json", found)
    assert skip_file.read(tmp_path / "skip.json", model_id) == found
    assert skip_file.read(stored(tmp_path / "own.json", model_id), model_id) == found
    assert found.skips == Skips((1, 3), (2,))


def test_fingerprints_tell_models_apart(folder, tmp_path):
    other = tiny.save("llama", tmp_path / "other", num_hidden_layers=5, seed=1)
    assert skip_file.fingerprint(open_model(str(folder), Silent())) != skip_file.fingerprint(
        open_model(str(other), Silent())
    )


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"attention": [0, 1]}, "attention: block 0: need 1 to 3"),
        ({"mlp": [4]}, "mlp: block 4: need 1 to 3, the first and the last block always compute"),
        ({"mlp": [-1]}, "mlp: block -1"),
        ({"mlp": [2, 2]}, "mlp: need ascending block numbers, each once"),
        ({"attention": [3, 1]}, "attention: need ascending"),
        ({"attention": 3}, "attention: got 3, need a list"),
        ({"attention": [True]}, "need a list of block numbers"),
        ({"attention": ["1"]}, "need a list of block numbers"),
        ({"blocks": "5"}, "blocks: got '5', need int"),
        ({"agreement": "much"}, "agreement: got 'much', need float"),
        ({"seed": ...}, "seed: missing"),
        ({"more": 1}, "more: unknown entry"),
        ({"schema": 2}, "schema: got 2, this sparsekit reads 1"),
    ],
)
def test_a_damaged_skip_set_is_refused_with_file_and_entry(tmp_path, changes, says):
    path = stored(tmp_path / "skip.json", "abc", **changes)
    with pytest.raises(CheckpointError) as refused:
        skip_file.read(path, "abc")
    assert str(refused.value).startswith(f"{path}: ")
    assert says in str(refused.value)


@pytest.mark.parametrize(
    ("content", "says"),
    [(b"", "not JSON"), (b"[1]", "not a JSON object"), (b"\xff", "not UTF-8"), (b"[" * 9999, "JSON")],
)
def test_no_skip_set_at_all(tmp_path, content, says):
    (tmp_path / "skip.json").write_bytes(content)
    with pytest.raises(CheckpointError, match=says):
        skip_file.read(tmp_path / "skip.json", "abc")


def test_a_missing_file_and_another_models(tmp_path):
    with pytest.raises(UsageError, match=r"cannot be read: No such file.*--skip-set search"):
        skip_file.read(tmp_path / "skip.json", "abc")
    with pytest.raises(UsageError, match=r"another model.*Search one"):
        skip_file.read(stored(tmp_path / "skip.json", "abc"), "abd")

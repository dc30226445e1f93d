"""Drafts of checkpoints that skip small inputs: the full model verifies or corrects them."""

from __future__ import annotations

import json
from contextlib import nullcontext

import pytest
import torch

from sparsekit.drafting import sparse_draft
from sparsekit.runtime import gates
from sparsekit.speculate.decoding import Window
from sparsekit.speculate.generating import Drafting, generate
from tests.fault.command import invoke
from tests.speculate.support import plain
from tests.support import gated, tiny

COUNT = 20
SETTINGS = {"max_new_tokens": COUNT, "do_sample": False}
OPTIONS = ("--prompt", "Small boats", "--max-new-tokens", COUNT)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("gated")
    source = tiny.save("llama", root / "model", num_hidden_layers=4)
    return gated.thin(source, root / "out", "teal-50").out


@pytest.fixture(scope="module")
def made(folder):
    model = gated.load(folder)
    model.generation_config.eos_token_id = None
    return model


def drafted(made, ids, window, threshold=None):
    return generate(made, ids, Drafting(*sparse_draft(made), window, threshold), settings=SETTINGS)[1]


def test_a_sparse_draft_gives_the_full_models_text(made):
    kept = 0
    for seed in range(4):
        ids = tiny.ids(1, 6, seed=seed)
        with gates.paused(made):
            want = plain(made, ids[0], COUNT)
        spoken = drafted(made, ids, Window(5, 0.0))
        assert spoken.ids == want
        assert spoken.accepted < spoken.drafted, "the draft is not sparse"
        kept += spoken.accepted
    assert kept > 0


def test_without_gates_at_work_the_draft_is_the_full_model(made):
    ids = tiny.ids(1, 6)
    with gates.paused(made):
        spoken = generate(made, ids, Drafting(nullcontext, window=Window(5, 0.0)), settings=SETTINGS)[1]
    assert spoken.accepted == spoken.drafted


def test_correction_between_the_sparse_and_the_full_model(made):
    ids = tiny.ids(1, 6, seed=1)
    with gates.paused(made):
        full = plain(made, ids[0], COUNT)
    sparse = plain(made, ids[0], COUNT)
    assert sparse != full
    assert drafted(made, ids, Window(4, 0.0), threshold=1.01).ids == full
    # One window over all: the first token follows the prompt, which is read in full either way; the last is the full
    # model's.
    assert drafted(made, ids, Window(COUNT, 0.0), threshold=0.0).ids[:-1] == sparse[:-1]


@pytest.mark.parametrize(
    ("options", "kind"), [(("--self-speculate", "sparse"), "sparse"), (("--correct", 4), "correct")]
)
def test_the_commands(folder, options, kind):
    ended = invoke("generate", folder, *OPTIONS, *options, "--json")
    assert ended.code == 0, ended.err
    drafts = json.loads(ended.out)["drafting"]
    assert drafts["kind"] == kind
    assert drafts["drafted"] > 0
    assert drafts["skipped"] is None
    summary = invoke("generate", folder, *OPTIONS, *options).err
    assert "drafted kept" in summary


def test_skipped_branches_of_a_sparse_checkpoint_give_the_full_models_text(folder, made, tmp_path):
    ended = invoke("generate", folder, *OPTIONS, "--self-speculate", "skip", "--json")
    assert ended.code == 0, ended.err
    document = json.loads(ended.out)
    tokenizer = tiny.byte_tokenizer()
    ids = torch.tensor(tokenizer("Small boats")["input_ids"])
    with gates.paused(made):
        want = plain(made, ids, COUNT, eos_token_id=2)
    assert document["text"] == tokenizer.decode(want, skip_special_tokens=True)

"""`sparsekit generate` with drafts: the same text, what came of the drafts, and what is refused."""

from __future__ import annotations

import json

import pytest

from tests.fault.command import check_refusal, invoke
from tests.runtime.support import both
from tests.support import tiny

PROMPT = "Small boats"
PLAIN = ("--prompt", PROMPT, "--max-new-tokens", 12)
SKIP = (*PLAIN, "--self-speculate", "skip")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 5}
    return both("llama", tmp_path_factory.mktemp("llama"), form="auto", **sizes)


@pytest.mark.parametrize("packed", [False, True])
def test_a_skip_set_is_searched_kept_and_used_again(folders, packed, tmp_path):
    kept = tmp_path / "skip.json"
    plain = invoke("generate", folders[packed], *PLAIN)
    first = invoke("generate", folders[packed], *SKIP, "--skip-set", "search", "--save-skip-set", kept)
    assert first.code == 0, first.err
    assert first.out == plain.out
    *_, found, summary = first.err.splitlines()
    assert "agreement" in found
    assert "found in" in found
    assert "drafted kept" in summary
    again = invoke("generate", folders[packed], *SKIP, "--skip-set", kept, "--json")
    assert again.err == ""
    document = json.loads(again.out)
    assert document["text"] + "\n" == plain.out
    drafts = document["drafting"]
    stored = json.loads(kept.read_text())
    assert drafts["skipped"] == {part: stored[part] for part in ("attention", "mlp")}
    assert stored["tries"] > 64
    assert drafts["kind"] == "skip"
    assert drafts["accepted"] + drafts["verifications"] + 1 == document["new_tokens"]
    assert drafts["accepted_share"] == drafts["accepted"] / drafts["drafted"]
    assert drafts["accepted_length"] == drafts["accepted"] / drafts["verifications"]


def test_the_models_own_skip_set_is_found(folders, tmp_path):
    import shutil

    folder = shutil.copytree(folders[0], tmp_path / "model")
    searched = invoke("generate", folder, *SKIP, "--save-skip-set", folder / "sparsekit_skip.json")
    assert "agreement" in searched.err
    used = invoke("generate", folder, *SKIP)
    assert "agreement" not in used.err
    assert used.out == searched.out


def test_draws_with_drafts_follow_the_seed(folders, tmp_path):
    kept = tmp_path / "skip.json"
    assert invoke("generate", folders[0], *SKIP, "--save-skip-set", kept).code == 0
    options = (*SKIP, "--skip-set", kept, "--temperature", 1.5, "--top-p", 0.95)
    texts = [invoke("generate", folders[0], *options, "--seed", seed).out for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]


def test_one_token_needs_no_draft(folders, tmp_path):
    kept = tmp_path / "skip.json"
    invoke("generate", folders[0], *SKIP, "--save-skip-set", kept)
    ended = invoke("generate", folders[0], *SKIP, "--skip-set", kept, "--max-new-tokens", 1, "--json")
    drafts = json.loads(ended.out)["drafting"]
    assert (drafts["drafted"], drafts["accepted_share"], drafts["accepted_length"]) == (0, None, None)


# --- refusals ----------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--self-speculate", "skip", "--correct", 4], ["cannot both draft", "Choose one"]),
        (["--skip-set", "search"], ["belong to --self-speculate skip"]),
        (["--correct", 4, "--save-skip-set", "x"], ["belong to --self-speculate skip"]),
        (["--correct", 4, "--correct-threshold", 1.5], ["--correct-threshold 1.5", "0 to 1"]),
        (["--self-speculate", "skip", "--skip-set", "/nowhere/x"], ["/nowhere/x", "No such file"]),
        (["--self-speculate", "sparse"], ["skips no inputs", "--recipe teal-50"]),
        (["--correct", 4], ["skips no inputs"]),
    ],
)
def test_what_cannot_be_drafted_is_refused(folders, options, says):
    check_refusal(invoke("generate", folders[0], *PLAIN, *options), 2, *says)


def test_another_models_skip_set_is_refused(folders, tmp_path):
    kept = tmp_path / "skip.json"
    invoke("generate", folders[0], *SKIP, "--save-skip-set", kept)
    refused = invoke("generate", folders[1], *SKIP, "--skip-set", kept)
    check_refusal(refused, 2, str(kept), "another model", "--skip-set search")


def test_models_that_cannot_draft_are_refused(tmp_path):
    falcon = tiny.save("falcon", tmp_path / "falcon")
    check_refusal(invoke("generate", falcon, *SKIP), 3, "FalconForCausalLM", "linears")

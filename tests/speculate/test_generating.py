"""Drafts inside model.generate: its settings, processors and streamer apply."""

from __future__ import annotations

import pytest
import torch

from sparsekit.errors import UsageError
from sparsekit.speculate.decoding import Window
from sparsekit.speculate.generating import Drafting, generate
from sparsekit.speculate.skipping import Skipper, Skips
from tests.speculate.support import model, plain
from tests.support import tiny

COUNT = 20
GREEDY = {"max_new_tokens": COUNT, "do_sample": False}


def drafting(made):
    return Drafting(Skipper(made).skipping(Skips((1, 3), (2,))), window=Window(4, 0.0))


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"repetition_penalty": 1.3},
        {"no_repeat_ngram_size": 2},
        {"suppress_tokens": [5, 6, 7, 8], "min_new_tokens": 12, "eos_token_id": [9, 70]},
        {"exponential_decay_length_penalty": (3, 1.5), "eos_token_id": 40},
    ],
)
def test_the_text_is_that_of_generate_under_any_settings(settings):
    made = model("llama")
    for seed in range(2):
        ids = tiny.ids(1, 6, seed=seed)
        for name, value in settings.items():
            setattr(made.generation_config, name, value)
        got, spoken = generate(made, ids, drafting(made), settings=GREEDY)
        assert got[0, 6:].tolist() == plain(made, ids[0], COUNT) == spoken.ids
        assert spoken.drafted > spoken.accepted > 0


def test_a_streamer_hears_prompt_tokens_and_end():
    class Streamer:
        heard: list = []  # noqa: RUF012

        def put(self, value):
            self.heard.append(value.tolist())

        def end(self):
            self.heard.append("end")

    made = model("llama")
    ids = tiny.ids(1, 6)
    _, spoken = generate(made, ids, drafting(made), streamer=Streamer(), settings=GREEDY)
    assert Streamer.heard == [ids.tolist(), *([token] for token in spoken.ids), "end"]


def test_draws_follow_torchs_seed():
    made = model("llama")
    texts = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        settings = {"max_new_tokens": 12, "do_sample": True, "temperature": 1.3, "top_p": 0.9}
        texts.append(generate(made, tiny.ids(1, 6), drafting(made), settings=settings)[0].tolist())
    assert texts[0] == texts[1] != texts[2]


def test_draws_keep_to_what_top_k_leaves():
    made = model("llama")
    settings = {"max_new_tokens": COUNT, "do_sample": True, "temperature": 5.0, "top_k": 1}
    got, _ = generate(made, tiny.ids(1, 6), drafting(made), settings=settings)
    assert got[0, 6:].tolist() == plain(made, tiny.ids(1, 6)[0], COUNT)


def test_what_the_loop_cannot_do_is_refused():
    made = model("llama")
    with pytest.raises(UsageError, match="2 prompts"):
        generate(made, tiny.ids(2, 6), drafting(made))
    with pytest.raises(UsageError, match="MaxTimeCriteria"):
        generate(made, tiny.ids(1, 6), drafting(made), settings={"max_time": 9.0, **GREEDY})

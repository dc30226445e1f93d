"""`sparsekit generate`: the text of model.generate, streamed; on packed and dense folders; and what it refuses."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from transformers import AutoTokenizer
from typer.testing import CliRunner

from sparsekit.cli.app import build
from sparsekit.generate import GenerationRequest, generate
from sparsekit.models.source import open_model
from sparsekit.progress import Silent
from tests.fault.command import PROGRAM, check_refusal, invoke
from tests.runtime.support import both, load
from tests.support import tiny

TEMPLATE = "{% for m in messages %}[{{ m['content'] }}]{% endfor %}"
PROMPT = "Small boats"


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return both("llama", tmp_path_factory.mktemp("llama"), form="auto", hidden_size=64, intermediate_size=128)


def expected(folder, prompt=PROMPT, count=12):
    ids = AutoTokenizer.from_pretrained(folder)(prompt, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        made = load(folder).generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, do_sample=False)
    return AutoTokenizer.from_pretrained(folder).decode(made[0, ids.shape[1] :], skip_special_tokens=True)


@pytest.mark.parametrize("packed", [False, True])
def test_it_streams_what_model_generate_makes(folders, packed):
    pieces = []
    request = GenerationRequest(PROMPT, max_new_tokens=12)
    made = generate(open_model(str(folders[packed]), Silent()), request, pieces.append, Silent())
    assert "".join(pieces) == made.text == expected(folders[packed])
    assert len(pieces) > 1
    assert (made.new_tokens, made.finish) == (12, "length") or made.finish == "stop"
    assert made.runtime.packed == (21 if packed else 0)
    assert made.runtime.linears == 22


@pytest.mark.parametrize("packed", [False, True])
def test_the_command_prints_text_on_stdout_and_one_line_on_stderr(folders, packed):
    ended = invoke("generate", folders[packed], "--prompt", PROMPT, "--max-new-tokens", 12)
    assert ended.code == 0, ended.err
    assert ended.out == expected(folders[packed]) + "\n"
    (line,) = ended.err.splitlines()
    assert ("21 of 22 linears packed" if packed else "dense, 22 linears") in line
    assert "/s" in line
    assert len(line) <= 80


def test_json_and_standard_input(folders):
    result = CliRunner().invoke(
        build(), ["generate", str(folders[1]), "--json", "--max-new-tokens", "12"], input=PROMPT
    )
    document = json.loads(result.stdout)
    assert document["text"] == expected(folders[1])
    assert document["prompt_tokens"] == len(PROMPT)
    assert document["runtime"]["packed"] == 21
    assert document["tokens_per_second"] > 0
    assert result.stderr == ""


def test_draws_follow_the_seed_and_leave_the_generator_alone(folders):
    torch.manual_seed(5)
    before = torch.get_rng_state()
    options = ("--temperature", 1.5, "--top-p", 0.95, "--max-new-tokens", 12, "--prompt", PROMPT)
    texts = [invoke("generate", folders[0], *options, "--seed", seed).out for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]
    assert torch.equal(before, torch.get_rng_state())


def test_the_chat_template_is_used_where_there_is_one(tmp_path):
    source = tiny.save("llama", tmp_path / "model")
    tokenizer = tiny.byte_tokenizer()
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(source)
    lengths = {}
    for option in ("--chat", "--no-chat", "--quiet"):
        ended = invoke("generate", source, "--prompt", PROMPT, "--max-new-tokens", 2, "--json", option)
        lengths[option] = json.loads(ended.out)["prompt_tokens"]
    assert lengths["--chat"] == lengths["--quiet"] == lengths["--no-chat"] + 2


def test_generation_stops_at_the_length_the_model_reads(folders):
    ended = invoke("generate", folders[0], "--prompt", "x" * 60, "--json")
    assert json.loads(ended.out)["new_tokens"] <= 4
    assert "at most 4 new" in ended.err


# --- refusals ----------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("options", "code", "says"),
    [
        (["--prompt", " "], 2, ["empty"]),
        (["--prompt", "x" * 64], 2, ["64 tokens", "Shorten"]),
        (["--prompt", "a", "--chat"], 2, ["no chat template", "--no-chat"]),
        (["--prompt", "a", "--temperature", "inf"], 2, ["temperature inf"]),
        (["--prompt", "a", "--temperature", "1e-9"], 2, ["temperature"]),
        (["--prompt", "a\udcff"], 2, ["not UTF-8"]),
    ],
)
def test_what_cannot_be_done_is_refused(folders, options, code, says):
    check_refusal(invoke("generate", folders[0], *options), code, *says)


def test_no_folder_and_no_tokenizer(tmp_path):
    check_refusal(invoke("generate", tmp_path / "nowhere", "-p", "a"), 3, "does not exist")
    bare = tiny.save("llama", tmp_path / "bare", tokenizer=False)
    check_refusal(invoke("generate", bare, "-p", "a"), 3, "tokenizer", "is not there", "Put the tokenizer files")


def test_a_tokenizer_of_another_model(tmp_path):
    small = tiny.save("llama", tmp_path / "small", vocab_size=40)
    check_refusal(invoke("generate", small, "-p", "zzz"), 3, "another model")


# --- pipes and signals -------------------------------------------------------------------------------------
def start(folder, **pipes):
    endless = ["generate", str(folder), "-p", PROMPT, "--max-new-tokens", "100000", "--temperature", "9"]
    return subprocess.Popen(
        [sys.executable, "-c", PROGRAM, *endless], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **pipes
    )


@pytest.fixture(scope="module")
def endless(tmp_path_factory):
    """A model that reads much and never ends a text."""
    folder = tiny.save("llama", tmp_path_factory.mktemp("endless") / "model", max_position_embeddings=1 << 20)
    (folder / "generation_config.json").write_text("{}")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"eos_token_id": None}))
    return folder


def test_interrupting(endless):
    child = start(endless)
    assert child.stdout.read(1)
    child.send_signal(signal.SIGINT)
    out, err = child.communicate(timeout=60)
    assert child.returncode == 130
    assert out.endswith("\n")
    assert "interrupted" in err
    assert "Traceback" not in err


def test_a_reader_that_goes_away(endless):
    child = start(endless)
    assert child.stdout.read(1)
    os.close(child.stdout.fileno())
    deadline = time.monotonic() + 60
    while child.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    assert child.returncode == 141
    assert child.stderr.read() == ""

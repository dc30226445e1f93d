"""Runs in several processes: the same checkpoint as from one, and one end for all when a rank fails."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file

from sparsekit.checkpoint.verify import verify
from tests.fault.command import Nursery, invoke, leftovers, prune_arguments, settings
from tests.support import tiny
from tests.support.launch import fork, torchrun

FIVE = ["--set", "calibration.samples=5"]
SEARCH = settings(
    "calibration.samples=8",
    "stages.0.allocate.samples=8",
    "stages.0.allocate.sequence_length=32",
    "stages.0.allocate.tokens=[32,64]",
    "stages.0.allocate.offspring=5",
    "stages.0.allocate.generations=4",
)
ON_RANK = """
import os, signal
import sparsekit.prune as stage
from sparsekit import ranks
from sparsekit.errors import NumericalError
solve, block = stage._prune_linear, stage._prune_block
def at(rank, found, wanted=1):
    return ranks.here().rank == rank and found == wanted
"""
LOST = """
def broken(model, visit, *rest):
    if at({rank}, visit.index, {block}):
        os.kill(os.getpid(), signal.SIGKILL)
    return block(model, visit, *rest)
stage._prune_block = broken
"""
FAILS = """
def broken(linear, *rest):
    if at(1, linear.info.block):
        raise {error}
    return solve(linear, *rest)
stage._prune_linear = broken
"""


@pytest.fixture(scope="module")
def nursery(tmp_path_factory):
    with Nursery(tmp_path_factory.mktemp("logs"), TORCH_CPP_LOG_LEVEL="ERROR") as started:
        yield started


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    return {family: tiny.save(family, folder / family) for family in ("llama", "qwen3_moe")}


def errors(ended):
    return [line for line in ended.err.splitlines() if line.startswith("error: ")]


def tensors(out):
    return {key: value for file in sorted(out.glob("*.safetensors")) for key, value in load_file(file).items()}


def assert_same(one, other):
    """Masks and values: to the bit where sums are exact, and here wherever we have looked."""
    before, after = tensors(one), tensors(other)
    assert before.keys() == after.keys()
    for name, weight in before.items():
        assert torch.equal(weight == 0, after[name] == 0), name
        torch.testing.assert_close(weight, after[name], msg=name)


TWO_STAGES = """
sparsekit: 1
name: two
description: one after the other
stages:
  - {stage: prune, method: wanda, sparsity: 0.3}
  - {stage: prune, method: sparsegpt, sparsity: 0.6}
"""
LOSSES = """
sparsekit: 1
name: losses
description: what every rank measures alone
stages:
  - {stage: prune, method: wanda, sparsity: 0.6, allocate: {method: ecoflap, samples: 2, sequence_length: 8}}
"""
DROPPED = """
sparsekit: 1
name: dropped
description: a block goes, then half of the weights
stages:
  - {stage: reshape, method: layer_drop, drop: 0.4, generations: 2, offspring: 3, starts: 2, samples: 5,
     sequence_length: 32, tokens: [32, 64]}
  - {stage: prune, method: wanda, sparsity: 0.5}
"""
NARROWED = """
sparsekit: 1
name: narrowed
description: heads and neurons go
stages:
  - {stage: reshape, method: tyr, drop: 0.5, generations: 2, passes: 2, offspring: 3, samples: 5,
     sequence_length: 32, tokens: [32, 64]}
"""
MODULAR = """
sparsekit: 1
name: modular
description: heads and neurons become narrower
stages:
  - {stage: reshape, method: modegpt, width: 0.25, parts: all, allocate: influence, multiple: 4, head_multiple: 2}
"""
SLICED = """
sparsekit: 1
name: sliced
description: a narrower stream
stages:
  - {stage: reshape, method: slicegpt, width: 0.25, rotation: %s, allow_growth: true}
"""
THINNED = """
sparsekit: 1
name: thinned
description: small inputs are skipped
stages:
  - {stage: activations, method: wina, sparsity: 0.5, tolerance: 0.2}
"""
CASES = {
    "wanda": ("llama", "wanda-50", FIVE),
    "gradients": ("llama", "mfac-50", settings("stages.0.samples=3", "stages.0.sequence_length=32")),
    "permutation": ("llama", "ria-2of4", FIVE),
    "experts": ("qwen3_moe", "wanda-50", FIVE),
    "fewer samples than ranks": ("qwen3_moe", "owl-wanda-60", settings("calibration.samples=2")),
    "losses": ("llama", LOSSES, FIVE),
    "layers dropped": ("llama", DROPPED, FIVE),
    "narrowed": ("llama", NARROWED, FIVE),
    "modular": ("llama", MODULAR, FIVE),
    "sliced": ("llama", SLICED % "global", FIVE),
    "sliced by block": ("llama", SLICED % "per_block", FIVE),
    "activations": ("qwen3_moe", THINNED, settings("calibration.samples=7")),
    "two stages and a null": ("llama", TWO_STAGES, [*FIVE, "--nulls", "random"]),
}


@pytest.mark.parametrize(("case", "size"), zip(CASES, [2, 3, 2, 2, 3, 2, 2, 2, 2, 2, 3, 2, 2], strict=True))
def test_any_number_of_ranks_makes_the_same_checkpoint(case, size, nursery, models, tmp_path):
    family, recipe, more = CASES[case]
    if "stages" in recipe:
        (tmp_path / "recipe.yaml").write_text(recipe, encoding="utf-8")
        recipe = tmp_path / "recipe.yaml"
    found = {}
    for count in (1, size):
        out = tmp_path / f"out-{count}"
        arguments = prune_arguments(models[family], out, *more, recipe=recipe, evaluate="--nulls" in more)
        first, *others = [nursery.run(arguments)] if count == 1 else fork(nursery, count, arguments)
        assert first.code == 0, first.err
        assert [(other.code, other.out, other.err) for other in others] == [(0, "", "")] * (count - 1)
        assert verify(out, "semantic").problems == ()
        assert leftovers(out) == [out.name]
        found[count] = json.loads((out / "report.json").read_text(encoding="utf-8"))
    assert_same(tmp_path / "out-1", tmp_path / f"out-{size}")
    assert found[size]["ranks"] == size
    for one, other in zip(found[1]["stages"], found[size]["stages"], strict=True):
        assert one["notes"] == other["notes"]
        assert one["linears"].keys() == other["linears"].keys()
    for one, other in zip(*((found[each]["evaluation"] or {"nulls": []})["nulls"] for each in (1, size)), strict=True):
        assert one["perplexity"] == pytest.approx(other["perplexity"], rel=1e-6)


@pytest.fixture(scope="module")
def searched(nursery, models, tmp_path_factory):
    """The same search on 1, 2 and 3 ranks: their folders."""
    found = {}
    for size in (1, 2, 3):
        out = found[size] = tmp_path_factory.mktemp("search") / "out"
        arguments = prune_arguments(models["llama"], out, *SEARCH, recipe="evopress-50")
        ended = [nursery.run(arguments)] if size == 1 else fork(nursery, size, arguments)
        assert [each.code for each in ended] == [0] * size, ended[0].err
    return found


@pytest.mark.parametrize("size", [2, 3])
def test_a_search_finds_the_same_on_any_number_of_ranks(size, searched):
    def facts(out):
        return json.loads((out / "report.json").read_text(encoding="utf-8"))["stages"][0]["allocation"]

    assert_same(searched[1], searched[size])
    assert facts(searched[1]) == facts(searched[size])


def test_a_lost_rank_ends_all_and_the_run_goes_on_with_any_number(nursery, models, tmp_path):
    whole, out = tmp_path / "whole", tmp_path / "out"
    assert nursery.run(prune_arguments(models["llama"], whole, *FIVE, recipe="sparsegpt-60")).code == 0
    arguments = prune_arguments(models["llama"], out, *FIVE, recipe="sparsegpt-60")
    ended = torchrun(2, arguments, before=ON_RANK + LOST.format(rank=1, block=1))
    assert ended.code != 0
    (message,) = errors(ended)
    assert "rank 1 was lost" in message
    assert "Run the same command again" in message
    assert "exitcode  : 5 " in ended.err
    first, *others = fork(nursery, 3, arguments, before=ON_RANK + LOST.format(rank=0, block=2))
    assert first.code == -9
    assert [other.code for other in others] == [5, 5]
    assert ["rank 0 was lost" in other.err for other in others] == [True, False]
    done = fork(nursery, 3, arguments)
    assert [each.code for each in done] == [0, 0, 0]
    assert json.loads((out / "report.json").read_text(encoding="utf-8"))["stages"][0]["resumed_blocks"] == 2
    assert_same(whole, out)


def test_an_error_of_one_rank_is_that_of_all(nursery, models, tmp_path):
    arguments = prune_arguments(models["llama"], tmp_path / "out", *FIVE, recipe="sparsegpt-60")
    failing = FAILS.format(error="NumericalError('cannot be factored', where=linear.name)")
    first, *others = fork(nursery, 3, arguments, before=ON_RANK + failing)
    assert [each.code for each in (first, *others)] == [4, 4, 4]
    assert [other.err for other in others] == ["", ""]
    assert len(errors(first)) == 1
    assert "mlp" in errors(first)[0]
    assert "cannot be factored" in errors(first)[0]


def test_a_bug_of_one_rank_is_told_by_the_first_and_shown_where_it_is(nursery, models, tmp_path):
    arguments = prune_arguments(models["llama"], tmp_path / "out", *FIVE, recipe="sparsegpt-60")
    first, second = fork(nursery, 2, arguments, before=ON_RANK + FAILS.format(error="ZeroDivisionError('oops')"))
    assert [first.code, second.code] == [70, 70]
    assert "ZeroDivisionError: oops (rank 1)" in errors(first)[0]
    assert "Traceback" in second.err


def test_what_is_wrong_with_the_command_is_said_once(models, tmp_path):
    ended = torchrun(2, prune_arguments(models["llama"], tmp_path / "out", recipe="wnada-50"))
    assert len(errors(ended)) == 1
    assert "Did you mean 'wanda-50'" in errors(ended)[0]
    assert "exitcode  : 2 " in ended.err


def test_an_output_that_not_all_ranks_see_is_refused(nursery, models, tmp_path):
    arguments = prune_arguments(models["llama"], "spread/out", *FIVE, recipe="wanda-50")
    folder = f"os.chdir({str(tmp_path)!r} if os.environ['RANK'] == '0' else '/tmp')"
    first, second = fork(
        nursery, 2, arguments, before=f"import os; {folder}; from sparsekit import ranks; ranks._SEEN_SECONDS = 0.3"
    )
    assert [first.code, second.code] == [5, 5]
    assert "spread: rank 1 on " in errors(first)[0]
    assert list((tmp_path / "spread").iterdir()) == []


def test_other_commands_want_one_process(monkeypatch):
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    ended = invoke("methods")
    assert ended.code == 2
    assert "methods runs in one process, a launcher has started 2" in ended.error

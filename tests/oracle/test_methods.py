"""Scores and masks against a brute force in float64; Wanda through the walker against Wanda by hand."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from sparsekit.checkpoint.source import open_weights
from sparsekit.contracts import LinearInfo
from sparsekit.models.lazy_model import LazyModel
from sparsekit.pattern import Unstructured
from sparsekit.progress import Silent
from sparsekit.pruners.magnitude import Magnitude, MagnitudeOptions
from sparsekit.pruners.random import Random, RandomOptions
from sparsekit.pruners.wanda import Wanda, WandaOptions
from sparsekit.stats.sumsq import SumSq
from sparsekit.walk import walk
from tests.support import tiny
from tests.support.allocation import allocator, context

INFO = LinearInfo("l", 0, 6, 10)


def weight_and_inputs(seed=0):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(6, 10, generator=generator)
    x = torch.randn(40, 10, generator=generator) * torch.logspace(-2, 2, 10)
    return weight, x


def top(scores: list[float], count: int) -> set[int]:
    return set(sorted(range(len(scores)), key=lambda i: (-scores[i], i))[:count])


def test_wanda_is_weight_times_input_norm_per_row():
    weight, x = weight_and_inputs()
    stat = SumSq(10)
    stat.update(x)
    pruned = Wanda(WandaOptions(), 0).fit(INFO, weight, {"sumsq": stat})(Unstructured(), 30)
    for row in range(6):
        scores = [abs(float(weight[row, j])) * float((x[:, j].double() ** 2).sum() ** 0.5) for j in range(10)]
        assert set(pruned.keep[row].nonzero()[:, 0].tolist()) == top(scores, 5)
    assert torch.equal(pruned.weight, torch.where(pruned.keep, weight, 0))


def test_wanda_with_equal_norms_is_magnitude_by_row():
    weight, _ = weight_and_inputs()
    stat = SumSq(10)
    stat.update(torch.ones(4, 10))
    wanda = Wanda(WandaOptions(), 0).fit(INFO, weight, {"sumsq": stat})(Unstructured(), 30)
    magnitude = Magnitude(MagnitudeOptions(group="row"), 0).fit(INFO, weight, {})(Unstructured(), 30)
    assert torch.equal(wanda.keep, magnitude.keep)


def test_wanda_ignores_the_scale_of_its_inputs_and_follows_permutations():
    weight, x = weight_and_inputs()
    rows, columns = torch.randperm(6), torch.randperm(10)

    def keep(w, inputs):
        stat = SumSq(10)
        stat.update(inputs)
        return Wanda(WandaOptions(), 0).fit(INFO, w, {"sumsq": stat})(Unstructured(), 30).keep

    assert torch.equal(keep(weight, x), keep(weight, 8 * x))
    assert torch.equal(keep(weight, x)[rows][:, columns], keep(weight[rows][:, columns], x[:, columns]))


def test_magnitude_by_linear_is_one_ranking():
    weight, _ = weight_and_inputs()
    pruned = Magnitude(MagnitudeOptions(), 0).fit(INFO, weight, {})(Unstructured(), 17)
    assert set(pruned.keep.reshape(-1).nonzero()[:, 0].tolist()) == top(weight.abs().reshape(-1).tolist(), 17)


def test_random_depends_on_seed_and_name_alone():
    weight, _ = weight_and_inputs()

    def keep(seed, name):
        return Random(RandomOptions(), seed).fit(LinearInfo(name, 0, 6, 10), weight, {})(Unstructured(), 30).keep

    assert torch.equal(keep(0, "a"), keep(0, "a"))
    assert not torch.equal(keep(0, "a"), keep(1, "a"))
    assert not torch.equal(keep(0, "a"), keep(0, "b"))
    assert int(keep(3, "c").sum()) == 30


@pytest.mark.parametrize("levels", [3, 100_000])
@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.9, 1.0])
def test_global_magnitude_counts_are_those_of_one_sort_of_all_weights(levels, share):
    generator = torch.Generator().manual_seed(1)
    linears = [LinearInfo(f"l{i}", 0, 5, 7 + i) for i in range(4)]
    weights = {
        linear.name: (torch.randint(-levels, levels, (5, linear.in_features), generator=generator) / 7).float()
        * (i + 1)
        for i, linear in enumerate(linears)
    }

    everything = torch.cat([weights[linear.name].abs().reshape(-1) for linear in linears]).tolist()
    budget = round(share * len(everything))
    counts = allocator("global_magnitude").allocate(context(linears, weights), budget)
    kept = top(everything, budget)
    start = 0
    for linear in linears:
        assert counts[linear.name] == len(kept & set(range(start, start + linear.numel)))
        start += linear.numel


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2", "phi3", "mixtral"])
def test_wanda_through_the_walker_equals_wanda_by_hand(family, tmp_path):
    """Inputs captured by plain hooks on the plain model, pruned block by block, scored in float64."""
    folder = tiny.save(family, tmp_path, tokenizer=False)
    samples = tiny.ids(12, 40)
    reference = AutoModelForCausalLM.from_pretrained(folder, experts_implementation="eager").eval()
    model = LazyModel(open_weights(folder), AutoConfig.from_pretrained(folder), torch.float32)
    for visit in walk(model, samples, Silent()):
        targets = [linear for linear in visit.linears if linear.expert is None]
        stats = visit.collect(targets, frozenset({"sumsq"}))
        inputs: dict[str, list[torch.Tensor]] = {linear.name: [] for linear in targets}
        handles = [
            reference.get_submodule(name).register_forward_pre_hook(
                lambda m, args, seen=inputs[name]: seen.append(args[0].reshape(-1, args[0].shape[-1]).double())
            )
            for name in inputs
        ]
        with torch.no_grad():
            for ids in samples:
                reference(ids[None], use_cache=False)
        for handle in handles:
            handle.remove()
        for linear in targets:
            weight = linear.weight().clone()
            budget = linear.info.numel // 2
            pruned = Wanda(WandaOptions(), 0).fit(linear.info, weight, stats[linear.name])(Unstructured(), budget)
            norm = torch.cat(inputs[linear.name]).square().sum(0).sqrt()
            score = weight.double().abs() * norm
            by_hand = torch.zeros_like(pruned.keep)
            by_hand.scatter_(1, score.topk(linear.info.in_features // 2, dim=1).indices, True)
            assert (by_hand != pruned.keep).float().mean() < 1e-3, linear.name  # float32 ties at the border
            stored = linear.replace(pruned.weight)
            owner = reference.get_submodule(linear.name)
            owner.weight.data = (stored.T if linear.transposed else stored).clone()

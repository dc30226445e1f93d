"""Neurons chosen by the prompt: against a dense model whose other neurons are set to zero by hooks."""

from __future__ import annotations

import functools
import json
import shutil

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sparsekit.checkpoint.source import SIDECAR
from sparsekit.data import TokenBlocks
from sparsekit.errors import CheckpointError, PlanError, UnsupportedFamily
from sparsekit.evaluate.compare import compare
from sparsekit.evaluate.perplexity import score
from sparsekit.models.gate_files import gate_file_bytes, read_gate_file
from sparsekit.models.gates import OfPrompt, most_used, prompt_use
from sparsekit.models.roles import FAMILIES
from sparsekit.pack.verify import verify
from sparsekit.runtime import gates
from sparsekit.runtime.neurons import real_tokens
from tests.activations.test_files import rewrite, say, site
from tests.support import tiny
from tests.support.gated import load, plan, thin

PLAIN = sorted(set(tiny.FAMILIES) & set(FAMILIES) - set(tiny.MOE_FAMILIES))
OPTIONS = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": -1, "pad_token_id": 0}


@pytest.fixture(scope="module")
def griffin(tmp_path_factory):
    @functools.cache
    def made(family="llama", *sets):
        folder = tmp_path_factory.mktemp(family)
        tiny.save(family, folder / "model")
        thin(folder / "model", folder / "out", "griffin-50", *sets)
        return folder

    return made


class Reference:
    """A dense model that notes in float64 what its MLPs use while `reading`, and has zeros for the rest otherwise."""

    def __init__(self, folder):
        self.model, self.reading, self.real = load(folder / "model"), True, None
        self.kept, self.texts = {}, 1
        for name, placed in read_gate_file(folder / "out").gates.items():
            hook = functools.partial(self.hook, name, placed.gate.count)
            self.model.get_submodule(name).register_forward_pre_hook(hook)

    def hook(self, name, count, module, args):
        z = args[0].reshape(self.texts, -1, args[0].shape[-1])
        if not self.reading:
            return ((z * self.kept[name]).reshape(args[0].shape),)
        wide = z.double()
        shares = (wide / wide.norm(dim=-1, keepdim=True)).square()
        real = torch.ones(z.shape[:2]) if self.real is None else self.real
        use = (shares * real[..., None]).sum(1)
        joint = (use.sqrt() / real.sum(1, keepdim=True).sqrt()).sum(0)
        self.kept[name] = torch.zeros(z.shape[-1]).scatter(0, joint.topk(count).indices, 1.0)
        return None

    def decode(self, prompt, steps, **options):
        """Return the greedy tokens and their logits."""
        self.reading, self.texts, cache = True, len(prompt), None
        ids, mask, logits = prompt, options.get("attention_mask", torch.ones_like(prompt)), []
        made = []
        for _ in range(steps):
            places = (mask.cumsum(1) - 1).clamp_min(0)[:, -ids.shape[1] :]
            positions = {} if bool(mask.all()) else {"position_ids": places}
            with torch.no_grad():
                out = self.model(ids, attention_mask=mask, past_key_values=cache, use_cache=True, **positions)
            mask = torch.cat([mask, torch.ones(len(prompt), 1, dtype=mask.dtype)], dim=1)
            self.reading, cache = False, out.past_key_values
            logits.append(out.logits[:, -1])
            ids = logits[-1].argmax(-1, keepdim=True)
            made.append(ids)
        return torch.cat(made, dim=1), torch.stack(logits)


def generated(model, ids, **options):
    found = model.generate(ids, output_logits=True, return_dict_in_generate=True, **{**OPTIONS, **options})
    return found.sequences[:, ids.shape[1] :], torch.stack(found.logits)


def close(found, wanted):
    torch.testing.assert_close(found, wanted, atol=1e-3, rtol=1e-3)


# --- the statistic -------------------------------------------------------------------------------------------
@given(st.integers(0, 500), st.integers(1, 12), st.integers(2, 40))
def test_the_statistic_is_the_norm_over_tokens_of_a_neurons_share(seed, tokens, width):
    z = torch.randn(tokens, width, generator=torch.Generator().manual_seed(seed)) * 30
    use, counted = prompt_use(z)
    wide = z.double()
    wanted = torch.stack([row / row.square().sum().sqrt() for row in wide]).square().sum(0).sqrt()
    torch.testing.assert_close(use.sqrt().double(), wanted, atol=1e-6, rtol=1e-5)
    assert int(counted) == tokens


def test_parts_of_a_prompt_add_up_and_padding_counts_nothing():
    z = torch.randn(2, 9, 7)
    whole, first, rest = prompt_use(z), prompt_use(z[:, :4]), prompt_use(z[:, 4:])
    torch.testing.assert_close(whole[0], first[0] + rest[0])
    assert whole[1].tolist() == [9, 9]
    real = torch.ones(2, 9, dtype=torch.bool)
    real[1, :5] = False
    padded = prompt_use(z, real)
    torch.testing.assert_close(padded[0][1], prompt_use(z[1:, 5:])[0][0])
    assert padded[1].tolist() == [9, 4]
    assert not bool(prompt_use(torch.zeros(1, 3, 4))[0].isnan().any())


def test_the_highest_scores_are_chosen_the_first_of_equal_ones():
    assert most_used(torch.tensor([1.0, 3.0, 2.0, 3.0, 2.0]), 3).tolist() == [1, 2, 3]
    assert most_used(torch.zeros(4), 2).tolist() == [0, 1]


def test_every_text_has_its_own_choice_and_without_a_prompt_all_stays():
    prompt, x = torch.eye(4)[[0, 1]].reshape(2, 1, 4), torch.ones(2, 3, 4)
    assert OfPrompt(1).behind(prompt)(x)[:, 0].tolist() == [[1, 0, 0, 0], [0, 1, 0, 0]]
    assert torch.equal(OfPrompt(1).behind(prompt[:, :0])(x), x)
    nothing = torch.tensor([[True], [False]])
    assert OfPrompt(1).behind(prompt, nothing)(x)[:, 0].tolist() == [[1, 0, 0, 0], [1, 1, 1, 1]]


def test_real_tokens_of_every_form_of_mask():
    rows = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]])
    wanted = rows[:, 1:].bool()
    assert torch.equal(real_tokens(rows, 1, 3), wanted)
    seen = rows[:, None, None, :].bool() & torch.ones(3, 4).tril(1).bool()
    assert torch.equal(real_tokens(seen, 1, 3), wanted)
    added = torch.where(seen, 0.0, torch.finfo(torch.float32).min)
    assert torch.equal(real_tokens({"full_attention": added}, 1, 3), wanted)
    assert real_tokens(None, 0, 4) is None
    assert real_tokens(torch.ones(2, 4), 0, 4) is None


# --- generation ----------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("family", "packed"), [*((name, False) for name in PLAIN), *((name, True) for name in ("llama", "gpt2", "phi3"))]
)
def test_decoding_is_that_of_a_model_with_zeros(family, packed, griffin):
    folder = griffin(family)
    model, reference = load(folder / "out", packed=packed), Reference(folder)
    ids = tiny.ids(1, 9)
    tokens, logits = generated(model, ids)
    wanted, theirs = reference.decode(ids, 8)
    assert torch.equal(tokens, wanted)
    close(logits, theirs)
    with gates.paused(model):
        dense = generated(model, ids)[1]
    assert torch.equal(logits[0], dense[0])  # the prompt is dense
    assert not torch.allclose(logits[2:], dense[2:], atol=1e-3)


def test_a_second_prompt_chooses_anew(griffin):
    folder = griffin()
    model, fresh, second = load(folder / "out"), load(folder / "out"), tiny.ids(1, 7, seed=5)
    generated(model, tiny.ids(1, 9))
    assert torch.equal(generated(model, second)[1], generated(fresh, second)[1])


def test_rows_of_a_batch_share_a_choice_that_padding_has_no_part_in(griffin):
    folder = griffin()
    ids, mask = tiny.ids(2, 9), torch.ones(2, 9, dtype=torch.long)
    ids[0, :4], mask[0, :4] = 0, 0
    reference = Reference(folder)
    reference.real = mask.float()
    found = generated(load(folder / "out"), ids, attention_mask=mask)
    wanted = reference.decode(ids, 8, attention_mask=mask)
    assert torch.equal(found[0], wanted[0])
    close(found[1], wanted[1])
    other = ids.clone()
    other[0, :4] = 7  # what stands in the padding does not matter
    assert torch.equal(generated(load(folder / "out"), other, attention_mask=mask)[0], found[0])


@pytest.mark.parametrize("options", [{"num_beams": 3}, {"cache_implementation": "static"}, {"prefill_chunk_size": 4},
                                     {"prefill_chunk_size": 5}, {"use_cache": False},
                                     {"prompt_lookup_num_tokens": 3}])  # fmt: skip
def test_other_ways_to_generate(options, griffin):
    """Beams are copies of one prompt, a fixed cache has a prepared mask, a prompt in parts is one prompt."""
    folder = griffin()
    ids, model = tiny.ids(1, 9), load(folder / "out")
    made = model.generate(ids, **{**OPTIONS, **options})
    reference = Reference(folder)
    assert made.shape == (1, 17)
    if "num_beams" not in options:
        assert torch.equal(made[:, 9:], reference.decode(ids, 8)[0])
        return
    state = [module for module in model.modules() if hasattr(module.__dict__.get("forward"), "neurons")]
    reference.decode(ids, 1)
    for name in read_gate_file(folder / "out").gates:
        forward = model.get_submodule(name).__dict__["forward"]
        assert forward in [each.__dict__["forward"] for each in state]
        assert forward.neurons.chosen().tolist() == reference.kept[name].nonzero()[:, 0].tolist()


def test_a_prompt_of_one_token_chooses_nothing(griffin):
    folder = griffin()
    model = load(folder / "out")
    generated(model, tiny.ids(1, 9))  # whose choice must not last
    ids = tiny.ids(1, 1)
    found = generated(model, ids)[1]
    with gates.paused(model):
        assert torch.equal(found, generated(model, ids)[1])


def test_the_full_model_is_there_when_it_is_asked_for(griffin):
    folder = griffin()
    model, dense, ids = load(folder / "out"), load(folder / "model"), tiny.ids(1, 9)
    with gates.paused(model):
        close(generated(model, ids)[1], generated(dense, ids)[1])
        generated(model, tiny.ids(1, 5))
    assert not torch.allclose(generated(model, ids)[1], generated(dense, ids)[1], atol=1e-3)
    gates.detach(model)
    close(generated(model, ids)[1], generated(dense, ids)[1])


def test_all_neurons_are_the_dense_model(griffin, tmp_path):
    folder = griffin()
    out = shutil.copytree(folder / "out", tmp_path / "out")
    for name in read_gate_file(out).gates:
        rewrite(out, site(name, count=48))
    ids = tiny.ids(2, 9)
    close(generated(load(out), ids)[1], generated(load(folder / "model"), ids)[1])


def test_packed_weights(tmp_path):
    """The chosen neurons of packed weights are unpacked; the file does not change its meaning."""
    folder = tiny.save("llama", tmp_path / "model")
    sets = ("stages.1.method=griffin", "stages.1.sparsity=0.5", "stages.1.allocate=uniform")
    thin(folder, tmp_path / "out", "wanda-50-teal-40", *sets)
    plain, packed, ids = load(tmp_path / "out"), load(tmp_path / "out", packed=True), tiny.ids(1, 9)
    found, wanted = generated(packed, ids), generated(plain, ids)
    assert torch.equal(found[0], wanted[0])
    close(found[1], wanted[1])
    assert gates.attached(packed)


# --- text that is scored -------------------------------------------------------------------------------------
@pytest.mark.parametrize("family", ["llama", "opt", "phi3"])
def test_text_is_scored_behind_its_first_half(family, griffin):
    folder = griffin(family)
    model, dense, reference, ids = load(folder / "out"), load(folder / "model"), Reference(folder), tiny.ids(3, 20)
    blocks = TokenBlocks(ids=ids, source="ids", fingerprint="", tokens_available=None)
    losses = score(model, blocks)
    assert losses.per_token.shape == (3, 9)
    with torch.no_grad():
        for row in range(3):
            reference.reading = True
            first = reference.model(ids[row : row + 1, :10], use_cache=True)
            reference.reading = False
            rest = reference.model(ids[row : row + 1, 10:], past_key_values=first.past_key_values).logits[0, :-1]
            wanted = torch.nn.functional.cross_entropy(rest, ids[row, 11:], reduction="none")
            close(losses.per_token[row].float(), wanted)
        batch = model(ids).logits  # every text of a batch by its own prompt
        for row in range(3):
            close(batch[row], model(ids[row : row + 1]).logits[0])
        close(batch[:, :10], dense(ids).logits[:, :10])
    both = compare(model, dense, blocks)
    assert both.model.prompt == both.baseline.prompt == 10
    assert both.baseline.tokens == 27
    assert both.model.loss == pytest.approx(float(losses.per_token.mean()))


def test_the_report_and_the_file_say_it(griffin):
    folder = griffin()
    report = json.loads((folder / "out" / "report.json").read_text())["activations"]
    assert report["held_out"]["sparsity"] == pytest.approx(0.5)
    assert report["held_out"]["together_8"] == pytest.approx(0.5)  # neurons are the same at all tokens
    assert "the second half of a text" in report["protocol"]
    file = read_gate_file(folder / "out")
    assert file.protocol == report["protocol"]
    assert {placed.gate.count for placed in file.gates.values()} == {24}
    assert gate_file_bytes(file) == (folder / "out" / SIDECAR).read_bytes()
    assert verify(folder / "out", "semantic").ok


@pytest.mark.parametrize("allocate", ["greedy", "global"])
def test_numbers_may_differ_between_blocks(allocate, griffin):
    folder = griffin("llama", f"stages.0.allocate={allocate}", "stages.0.tolerance=0.03", "stages.0.sparsity=0.6")
    counts = [placed.gate.count for placed in read_gate_file(folder / "out").gates.values()]
    assert sum(counts) == pytest.approx(3 * 48 * 0.4, abs=3)
    assert (len(set(counts)) == 1) == (allocate == "greedy")


# --- what is refused -----------------------------------------------------------------------------------------
@pytest.mark.parametrize("family", tiny.MOE_FAMILIES)
def test_experts_are_refused(family, tmp_path):
    with pytest.raises(UnsupportedFamily, match="its MLPs are experts, of which each token uses others"):
        plan(tiny.save(family, tmp_path / "model"), "griffin-50")


def test_a_sparse_prompt_is_refused(griffin):
    with pytest.raises(PlanError, match="chooses by the prompt, which therefore is dense"):
        plan(griffin() / "model", "griffin-50", "stages.0.prefill=sparse")


DOWN = "model.layers.1.mlp.down_proj"
DAMAGE = {
    "none": (site(DOWN, count=0), "count 0, needed a whole number above 0"),
    "half": (site(DOWN, count=1.5), "count 1.5, needed a whole number"),
    "NaN": (site(DOWN, count=float("nan")), "does not describe any signals"),
    "too many": (site(DOWN, count=49), "49 of 48 neurons would be kept"),
    "missing": (lambda said, tensors: said["sites"][DOWN].pop("count"), "count None"),
    "a vector": (lambda said, tensors: tensors.update({f"{DOWN}.kept": torch.ones(48)}), "no signal of the file has"),
    "an input": (site(DOWN, signal="input"), "rule 'prompt' at signal input"),
    "a threshold": (site(DOWN, rule="gaussian", deviations=1.0), "rule 'gaussian' at signal neurons"),
    "beside others": (site(DOWN, signal="input", rule="gaussian", deviations=1.0), "other rules stand beside it"),
    "a sparse prompt": (say(prefill="sparse"), "the prompt is not dense"),
    "another linear": (
        lambda said, tensors: said["sites"].update({"model.layers.1.mlp.up_proj": said["sites"].pop(DOWN)}),
        "signal neurons of Linear, which is no down projection",
    ),
    "a branch": (
        lambda said, tensors: said["sites"].update({"model.layers.1.mlp": said["sites"].pop(DOWN)}),
        "signal neurons of LlamaMLP, which is no down projection",
    ),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_named(damage, griffin, tmp_path):
    change, message = DAMAGE[damage]
    folder = shutil.copytree(griffin() / "out", tmp_path / "out")
    rewrite(folder, change)
    with pytest.raises(CheckpointError) as caught:
        load(folder)
    assert message in str(caught.value)
    assert SIDECAR in str(caught.value)

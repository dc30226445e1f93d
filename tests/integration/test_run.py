"""A recipe run on tiny models, end to end: what is written, what loads, what a killed run leaves."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from sparsekit import describe, run
from sparsekit.checkpoint.verify import verify
from sparsekit.errors import CalibrationError, OutputExists, PlanError, ResumeMismatch, TooFewTokens
from sparsekit.models.source import open_model
from sparsekit.plan import check_tokens
from sparsekit.prepared import prepare
from sparsekit.progress import Silent
from sparsekit.recipe.load import load_recipe
from tests.support import tiny

SMALL = [
    "calibration.source=builtin",
    "calibration.samples=3",
    "calibration.sequence_length=32",
    "save.format=dense",  # tests compare stored tensors; those of packed files say so
]
EVAL = ["evaluate.samples=2", "evaluate.sequence_length=32"]


def prune(folder, out, recipe="wanda-50", sets=(), evaluation=False, **options):
    chosen = load_recipe(recipe, [*SMALL, *EVAL, *sets])
    prepared = prepare(chosen, open_model(str(folder), Silent()))
    return run.execute(prepared, out, Silent(), evaluation=evaluation, **options)


def tensors(folder):
    return {k: v for f in sorted(folder.glob("*.safetensors")) for k, v in load_file(f).items()}


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return tiny.save("llama", tmp_path_factory.mktemp("llama"), dtype=torch.bfloat16)


@pytest.mark.parametrize(
    "family", ["llama", "gpt2", "phi3", "gemma2", "falcon", "bloom", "mixtral", "qwen3_moe", "gpt_oss"]
)
def test_a_pruned_model_loads_with_plain_transformers(family, tmp_path):
    folder = tiny.save(family, tmp_path / "model")
    outcome = prune(folder, tmp_path / "out")
    stage = outcome.report["stages"][0]
    assert stage["kept"] * 2 == stage["numel"]
    assert verify(tmp_path / "out", "semantic").problems == ()
    model, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    AutoTokenizer.from_pretrained(tmp_path / "out")
    before, after = tensors(folder), tensors(tmp_path / "out")
    assert before.keys() == after.keys()
    manifest = json.loads((tmp_path / "out/sparsekit.json").read_text())["tensors"]
    pruned = {name for name, facts in manifest.items() if facts["kept"] is not None}
    kept = 0
    for name in before:
        if name in pruned:
            same = after[name] == before[name]
            assert (after[name][~same] == 0).all()  # Wanda removes, it does not change
            kept += manifest[name]["kept"]
        else:
            assert torch.equal(before[name], after[name]), name
    assert kept == stage["kept"]
    with torch.no_grad():
        assert torch.isfinite(model(tiny.ids(1)).logits).all()


@pytest.mark.parametrize(
    ("recipe", "sets"),
    [
        ("magnitude-50", []),
        ("random-50", []),
        ("wanda-60", []),
        ("wanda-2of4", []),
        ("wanda-4of8", []),
        ("wanda-50", ["stages.0.pattern=1:4", "stages.0.sparsity=0.75"]),
        ("wanda-50", ["stages.0.pattern=4x2"]),
        ("magnitude-50", ["stages.0.pattern=8x1", "stages.0.group=row"]),
        ("magnitude-50", ["stages.0.allocate=global_magnitude"]),
        ("wanda-50", ["stages.0.group=linear"]),
        ("wanda-50", ["stages.0.propagate=none"]),
        ("wanda-50", ["stages.0.sparsity=0"]),
        ("wanda-50", ["stages.0.sparsity=1"]),
        ("wanda-50", ["stages.0.sparsity=0.99"]),
        ("sparsegpt-50", []),
        ("sparsegpt-2of4", []),
        ("sparsegpt-50", ["stages.0.pattern=4x2", "stages.0.strip=32"]),
        ("wanda-60", ["stages.0.update=obs"]),
        ("wanda-lstsq-60", []),
        ("alps-70", []),
        ("alps-60", ["stages.0.pattern=2:4", "stages.0.sparsity=0.5"]),
        ("ria-2of4", []),
        ("ria-2of4", ["stages.0.permute=false", "stages.0.pattern=unstructured", "stages.0.sparsity=0.5"]),
        ("dsnot-60", []),
        ("dsnot-2of4", ["stages.0.refine={method: dsnot, paper: true}"]),
        ("sparsegpt-60", ["stages.0.refine=dsnot", "stages.0.update=lstsq"]),
        ("magnitude-50", ["stages.0.update={method: obs, damping: 0.05}", "calibration.source=self"]),
    ],
)
def test_every_method_pattern_and_level_keeps_exact_counts(recipe, sets, llama, tmp_path):
    outcome = prune(llama, tmp_path / "out", recipe, sets)
    stage = outcome.report["stages"][0]
    sparsity = stage["sparsity"]
    assert abs(stage["kept"] - (1 - sparsity) * stage["numel"]) < 8
    assert verify(tmp_path / "out", "semantic").problems == ()
    zeros = sum(int((tensor == 0).sum()) for name, tensor in tensors(tmp_path / "out").items() if "proj" in name)
    assert zeros >= stage["numel"] - stage["kept"]


@pytest.mark.parametrize("recipe", ["sparsegpt-60", "alps-60", "dsnot-2of4"])
@pytest.mark.parametrize("family", ["llama", "qwen3_moe"])
def test_linears_side_by_side_are_pruned_as_one_after_the_other(family, recipe, tmp_path):
    folder = tiny.save(family, tmp_path / "model")
    before = torch.get_num_threads()
    found = []
    try:
        for threads in (1, 2):  # each of the two lanes has one thread, as the only lane before
            torch.set_num_threads(threads)
            prune(folder, tmp_path / str(threads), recipe, ["calibration.samples=8"])
            found.append(tensors(tmp_path / str(threads)))
    finally:
        torch.set_num_threads(before)
    assert found[0].keys() == found[1].keys()
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


def test_a_pattern_that_a_refiner_cannot_do_is_refused_before_anything_is_read(llama, tmp_path):
    with pytest.raises(PlanError, match=r"stages\.0\.refine: dsnot swaps single weights, which pattern 4x2 does not"):
        prune(llama, tmp_path / "out", "dsnot-50", ["stages.0.pattern=4x2"])


def test_too_few_tokens_for_a_fit_are_refused(llama, tmp_path):
    few = ["calibration.samples=1", "calibration.sequence_length=8"]
    with pytest.raises(TooFewTokens, match=r"stages\.0\.update: lstsq needs at least \d+ tokens, got 8"):
        prune(llama, tmp_path / "out", "wanda-lstsq-60", few)


def test_the_plan_counts_the_memory_of_a_factor(llama):
    source = open_model(str(llama), Silent())
    norms, factors = (prepare(load_recipe(name, SMALL), source) for name in ("wanda-50", "sparsegpt-50"))
    widest = max(linear.in_features for linear in factors.plans[0].targets)
    assert factors.cost.memory_bytes - norms.cost.memory_bytes >= 6 * 8 * widest**2


def test_sparsity_zero_leaves_every_bit(llama, tmp_path):
    prune(llama, tmp_path / "out", sets=["stages.0.sparsity=0"])
    before, after = tensors(llama), tensors(tmp_path / "out")
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_runs_without_calibration_read_no_text(llama, tmp_path):
    outcome = prune(llama, tmp_path / "out", "magnitude-50", ["calibration.source=missing.jsonl"])
    assert outcome.report["calibration"] is None


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_dtypes_are_kept(dtype, tmp_path):
    folder = tiny.save("llama", tmp_path / "model", dtype=dtype)
    prune(folder, tmp_path / "out")
    assert {tensor.dtype for tensor in tensors(tmp_path / "out").values()} == {dtype}


def test_an_asked_dtype_is_written_everywhere(tmp_path):
    folder = tiny.save("llama", tmp_path / "model", dtype=torch.float32)
    chosen = load_recipe("wanda-50", SMALL)
    source = open_model(str(folder), Silent(), dtype="bf16")
    run.execute(prepare(chosen, source), tmp_path / "out", Silent(), evaluation=False)
    assert {tensor.dtype for tensor in tensors(tmp_path / "out").values()} == {torch.bfloat16}
    assert json.loads((tmp_path / "out/config.json").read_text())["dtype"] == "bfloat16"
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto").dtype == torch.bfloat16


def test_side_files_go_along_and_weights_do_not(llama, tmp_path):
    source = tmp_path / "source"
    shutil.copytree(llama, source)
    for name in ("LICENSE", "chat_template.jinja", "vocab.txt"):
        (source / name).write_text(name)
    (source / "pytorch_model.bin").write_bytes(b"\x80\x04")
    prune(source, tmp_path / "out", "magnitude-50")
    assert (tmp_path / "out/LICENSE").read_text() == "LICENSE"
    assert (tmp_path / "out/chat_template.jinja").exists()
    assert not (tmp_path / "out/pytorch_model.bin").exists()
    for name in ("tokenizer.json", "tokenizer_config.json", "recipe.yaml", "report.json", "sparsekit.json"):
        assert (tmp_path / "out" / name).exists(), name


def test_the_saved_recipe_runs_again_and_gives_the_same_weights(llama, tmp_path):
    prune(llama, tmp_path / "one")
    chosen = load_recipe(str(tmp_path / "one/recipe.yaml"))
    run.execute(prepare(chosen, open_model(str(llama), Silent())), tmp_path / "two", Silent(), evaluation=False)
    one, two = tensors(tmp_path / "one"), tensors(tmp_path / "two")
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_evaluation_and_gates_are_part_of_the_run(llama, tmp_path):
    outcome = prune(llama, tmp_path / "out", evaluation=True, sets=["gates.max_perplexity_ratio=0.01"])
    assert outcome.evaluation.comparison.kl > 0
    assert "perplexity ratio" in outcome.missed_gates[0]
    assert (tmp_path / "out/sparsekit.json").exists()
    report = json.loads((tmp_path / "out/report.json").read_text())
    assert report["evaluation"]["comparison"]["kl"] == outcome.evaluation.comparison.kl
    assert report["missed_gates"] == list(outcome.missed_gates)


def test_a_second_run_finds_its_work_done(llama, tmp_path):
    first = prune(llama, tmp_path / "out")
    again = prune(llama, tmp_path / "out")
    assert not first.already_finished
    assert again.already_finished
    assert again.report["run_id"] == first.report["run_id"]
    with pytest.raises(OutputExists):
        prune(llama, tmp_path / "out", sets=["stages.0.sparsity=0.6"])
    prune(llama, tmp_path / "out", sets=["stages.0.sparsity=0.6"], overwrite=True)
    assert verify(tmp_path / "out", "semantic").problems == ()


def test_two_stages_chain_and_leave_nothing_behind(llama, tmp_path):
    stages = "[{stage: prune, method: magnitude, sparsity: 0.3}, {stage: prune, method: wanda, sparsity: 0.6}]"
    outcome = prune(llama, tmp_path / "out", sets=[f"stages={stages}"])
    assert [stage["kept"] / stage["numel"] for stage in outcome.report["stages"]] == pytest.approx([0.7, 0.4], abs=1e-4)
    prune(llama, tmp_path / "first", "magnitude-50", ["stages.0.sparsity=0.3"])
    first, both = tensors(tmp_path / "first"), tensors(tmp_path / "out")
    assert all(((both[name] == first[name]) | (both[name] == 0)).all() for name in both)
    assert sorted(p.name for p in tmp_path.iterdir() if not p.name.startswith("first")) == ["out"]


class Killed(BaseException):
    """Stands for SIGKILL: nothing of the run catches it."""


@pytest.mark.parametrize("recipe", ["wanda-50", "magnitude-50", "shortgpt-25"])
def test_killed_at_every_file_call_and_run_again_gives_the_same_bytes(recipe, llama, tmp_path, monkeypatch):
    """The k-th file-system call kills the run, for every k until a run gets through; then it is run again."""
    from sparsekit import fs

    prune(llama, tmp_path / "reference", recipe)
    wanted = json.loads((tmp_path / "reference/sparsekit.json").read_text())
    real = fs.FS
    points = 0
    calls = {"left": -1}

    class Mortal(type(real)):
        def __getattribute__(self, name):
            value = super().__getattribute__(name)
            if name in ("write", "fsync", "rename", "exchange", "unlink", "mkdir", "open_exclusive", "fsync_dir"):
                calls["left"] -= 1
                if calls["left"] == 0:
                    raise Killed
            return value

    step = 3 if recipe == "wanda-50" else 2
    for k in range(1, 10_000, step):
        out = tmp_path / f"run{k}"
        calls["left"] = k
        monkeypatch.setattr(fs, "FS", Mortal())
        try:
            prune(llama, out, recipe)
        except Killed:
            points += 1
        else:
            break
        finally:
            monkeypatch.setattr(fs, "FS", real)
        for lock in tmp_path.glob("*.lock"):
            lock.unlink()  # a killed process's lock is stale; this process is still alive
        prune(llama, out, recipe)
        manifest = json.loads((out / "sparsekit.json").read_text())
        assert manifest["identity_sha256"] == wanted["identity_sha256"], k
        assert sorted(p.name for p in tmp_path.iterdir() if p.name.startswith(f"run{k}")) == [f"run{k}"]
        shutil.rmtree(out)
    assert points >= 20


def test_a_resumed_run_names_what_changed(llama, tmp_path, monkeypatch):
    from sparsekit.checkpoint.staging import StagedCheckpoint

    def die(self, *args, **kwargs):
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(StagedCheckpoint, "commit", die)
        with pytest.raises(Killed):
            prune(llama, tmp_path / "out")
    with pytest.raises(ResumeMismatch, match=r"recipe\.stages\.0\.sparsity: 0\.5 -> 0\.6"):
        prune(llama, tmp_path / "out", sets=["stages.0.sparsity=0.6"])
    other = tiny.save("llama", tmp_path / "other", dtype=torch.bfloat16, seed=5)
    with pytest.raises(ResumeMismatch, match=r"model\.files\.model.safetensors"):
        prune(other, tmp_path / "out")
    with pytest.raises(ResumeMismatch, match=r"calibration"):
        prune(llama, tmp_path / "out", sets=["calibration.seed=4"])
    with monkeypatch.context() as patch:
        patch.setattr(describe, "__version__", "99")
        with pytest.raises(ResumeMismatch, match=r"versions\.sparsekit"):
            prune(llama, tmp_path / "out")
    resumed = prune(llama, tmp_path / "out")
    assert resumed.report["stages"][0]["resumed_blocks"] == 3


def test_no_resume_starts_afresh(llama, tmp_path, monkeypatch):
    from sparsekit.checkpoint.staging import StagedCheckpoint

    def die(self, *args, **kwargs):
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(StagedCheckpoint, "commit", die)
        with pytest.raises(Killed):
            prune(llama, tmp_path / "out")
    outcome = prune(llama, tmp_path / "out", sets=["stages.0.sparsity=0.6"], resume=False)
    assert outcome.report["stages"][0]["resumed_blocks"] == 0
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral"])
def test_a_packed_run_killed_in_the_middle_goes_on_bit_identically(family, tmp_path, monkeypatch):
    from sparsekit.checkpoint.staging import StagedCheckpoint
    from sparsekit.pack.files import PackedFile

    source = tiny.save(family, tmp_path / "model", dtype=torch.bfloat16)
    packed = ["save.format=auto"]
    prune(source, tmp_path / "whole", sets=packed)
    prune(source, tmp_path / "dense")
    written = []
    real = StagedCheckpoint.write_shard

    def die_after_two(self, *args, **kwargs):
        if len(written) == 2:
            raise Killed
        written.append(args[0])
        return real(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(StagedCheckpoint, "write_shard", die_after_two)
        with pytest.raises(Killed):
            prune(source, tmp_path / "out", sets=packed)
    resumed = prune(source, tmp_path / "out", sets=packed)
    assert resumed.report["stages"][0]["resumed_blocks"] == 2
    identities = [
        json.loads((tmp_path / name / "sparsekit.json").read_text())["identity_sha256"] for name in ("whole", "out")
    ]
    assert identities[0] == identities[1]
    dense = tensors(tmp_path / "dense")
    for file in sorted((tmp_path / "out").glob("*.safetensors")):
        opened = PackedFile(file)
        for name in opened.names():
            assert torch.equal(opened.dense(name), dense.pop(name)), name
    assert not dense
    assert "import sparsekit" in (tmp_path / "out/README.md").read_text()
    assert "import sparsekit" not in (tmp_path / "dense/README.md").read_text()


def test_calibration_text_of_the_model_itself_is_named_and_repeats(llama, tmp_path):
    first = prune(llama, tmp_path / "a", sets=["calibration.source=self"]).report
    second = prune(llama, tmp_path / "b", sets=["calibration.source=self"]).report
    assert first["calibration"]["source"] == "written by the model itself (seed 0)"
    assert first["calibration"]["tokens"] == 96
    assert first["calibration"]["fingerprint"] == second["calibration"]["fingerprint"]
    assert first["stages"][0]["linears"].keys() == second["stages"][0]["linears"].keys()
    with pytest.raises(CalibrationError, match="config, split and field"):
        prune(llama, tmp_path / "c", sets=["calibration.source=self", "calibration.split=train"])


def test_a_solver_refuses_too_few_tokens_and_advises_more(llama):
    prepared = prepare(load_recipe("sparsegpt-50", SMALL), open_model(str(llama), Silent()))
    width = json.loads((llama / "config.json").read_text())["intermediate_size"]
    told = f"calibration tokens for {width} inputs of model.layers.0.mlp.down_proj"
    assert prepared.notes == (f"96 {told}: sparsegpt is better with {4 * width} or more",)
    with pytest.raises(
        TooFewTokens, match=f"sparsegpt needs at least {width // 8} tokens, got {width // 8 - 1} {told}"
    ):
        check_tokens(prepared.plans[0], width // 8 - 1, where="stages.0")


def test_a_solver_reports_the_true_output_error(llama, tmp_path):
    facts = prune(llama, tmp_path / "out", "sparsegpt-50").report["stages"][0]["linears"]
    assert all(0 < linear["output_error"] < 1 for linear in facts.values())
    assert all("output_error_diagonal" not in linear for linear in facts.values())

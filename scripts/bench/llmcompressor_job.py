"""Wanda or SparseGPT with llmcompressor, as its own examples do it; run by the Python of an environment that has it.

Usage: python llmcompressor_job.py JOB.json. The job names the model folder, the token ids (a JSON list of lists), the
output folder, the method, the sparsity, the mask structure (zeros of each M, as that tool counts; 0:0 for none) and
where the timings go. Everything the process does counts in its wall time and peak
memory, which the caller measures; the timings of the steps are written by this file.
"""

from __future__ import annotations

import json
import sys
import time
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path


def main() -> None:
    """Run the job named on the command line."""
    job = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    marks = [time.perf_counter()]
    from datasets import Dataset
    from llmcompressor import oneshot
    from llmcompressor.modifiers.pruning import SparseGPTModifier, WandaPruningModifier
    from transformers import AutoModelForCausalLM, AutoTokenizer

    marks.append(time.perf_counter())
    model = AutoModelForCausalLM.from_pretrained(job["model"], dtype="auto")
    tokenizer = AutoTokenizer.from_pretrained(job["model"])
    modifier = {"wanda": WandaPruningModifier, "sparsegpt": SparseGPTModifier}[job["method"]]
    ids = json.loads(Path(job["ids"]).read_text(encoding="utf-8"))
    data = Dataset.from_dict({"input_ids": ids, "attention_mask": [[1] * len(row) for row in ids]})
    marks.append(time.perf_counter())
    oneshot(
        model=model,
        tokenizer=tokenizer,
        dataset=data,
        recipe=modifier(sparsity=job["sparsity"], mask_structure=job["structure"], ignore=["re:.*lm_head"]),
        max_seq_length=len(ids[0]),
        num_calibration_samples=len(ids),
        shuffle_calibration_samples=False,
    )
    marks.append(time.perf_counter())
    model.save_pretrained(job["out"], save_compressed=False)
    tokenizer.save_pretrained(job["out"])
    marks.append(time.perf_counter())
    steps = dict(zip(("import", "load", "prune", "save"), (end - start for start, end in pairwise(marks)), strict=True))
    result = {
        "steps": steps,
        "versions": {name: version(name) for name in ("llmcompressor", "torch", "transformers", "compressed-tensors")},
    }
    Path(job["result"]).write_text(json.dumps(result), encoding="utf-8")


if __name__ == "__main__":
    main()

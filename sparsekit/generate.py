"""Running a prompt through a model, text streaming out as it is made or as drafts of it are verified."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from sparsekit.drafting import DraftReport, DraftRequest, prepare
from sparsekit.errors import ModelError, UsageError
from sparsekit.lazy import torch
from sparsekit.models.source import ModelSource
from sparsekit.plan import BASE_MEMORY_BYTES, require_memory
from sparsekit.progress import Reporter
from sparsekit.runtime.layers import Runtime, describe_runtime
from sparsekit.speculate import generating as speculating
from sparsekit.speculate.decoding import Spoken

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase, TextStreamer

_TEMPERATURES = (0.01, 100.0)  # beyond, probabilities are infinite or all the same


@dataclass(frozen=True)
class GenerationRequest:
    """What to generate.

    Attributes:
        prompt: Text.
        max_new_tokens: At most so many tokens are made.
        chat: Put the prompt into the tokenizer's chat template; None: where there is one.
        temperature: 0 takes the likeliest token (greedy); above, tokens are drawn.
        top_p: Draw from the likeliest tokens that together have this probability.
        seed: Of the draws.
        threads: Threads to compute with; None: torch's own choice.
        drafting: Whether and how tokens are drafted.
    """

    prompt: str
    max_new_tokens: int = 128
    chat: bool | None = None
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    threads: int | None = None
    drafting: DraftRequest = field(default_factory=DraftRequest)


@dataclass(frozen=True)
class Generation:
    """What was generated.

    Attributes:
        text: The new text, special tokens left out.
        prompt_tokens, new_tokens: Numbers of tokens; the end-of-text token counts.
        finish: `stop`, the model ended the text; `length`, max_new_tokens did.
        chat: Whether the chat template was used.
        first_token_seconds: From the call to the first token.
        tokens_per_second: Of the tokens after the first; None where there is only one.
        threads: Threads computed with.
        runtime: What multiplied.
        drafting: What came of drafts; None without.
    """

    text: str
    prompt_tokens: int
    new_tokens: int
    finish: str
    chat: bool
    first_token_seconds: float
    tokens_per_second: float | None
    threads: int
    runtime: Runtime
    drafting: DraftReport | None

    def to_json(self) -> dict[str, Any]:
        """Return all of it as JSON."""
        return asdict(self)


def generate(
    source: ModelSource, request: GenerationRequest, write: Callable[[str], None], reporter: Reporter
) -> Generation:
    """Run a prompt through a model, packed or dense.

    Args:
        source: The opened model.
        request: What to generate.
        write: Called with each piece of text as soon as it is certain.
        reporter: Told what was cut short.

    Raises:
        UsageError: An empty prompt, one longer than the model can read, a temperature nobody can draw with, a chat
            template where there is none, or drafts that cannot be made.
        UnsupportedFamily: Drafts of a model that cannot take them back.
        ModelError: No tokenizer, or the model cannot be loaded.
        OutOfMemory: The model does not fit.
    """
    if request.temperature and not _TEMPERATURES[0] <= request.temperature <= _TEMPERATURES[1]:
        low, high = _TEMPERATURES
        raise UsageError(f"temperature {request.temperature:g}: need 0 (greedy) or {low:g} to {high:g}")
    request.drafting.check()
    ids, chat = _encode(source, request)
    room = source.max_length - ids.shape[1]
    if room < 1:
        raise UsageError(
            f"the prompt has {ids.shape[1]:,} tokens, the model reads {source.max_length:,}", hint="Shorten it."
        )
    if request.max_new_tokens > room:
        reporter.note(f"the model reads {source.max_length:,} tokens: at most {room:,} new ones")
    need = BASE_MEMORY_BYTES + source.weights.total_bytes
    require_memory(need, f"running {source.name}", "Use a machine with more memory.")
    if request.threads is not None:
        torch.set_num_threads(request.threads)
    model = source.load(packed=True)
    times, streamer = _timed_streamer(source.tokenizer, write)
    prepared = prepare(model, source, request.drafting, reporter) if request.drafting else None
    settings = _settings(request, min(request.max_new_tokens, room))
    spoken = Spoken()
    start = time.perf_counter()
    with torch.inference_mode(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(request.seed)  # generate draws from torch's global generator, restored behind it
        if prepared is None:
            made = model.generate(ids, attention_mask=torch.ones_like(ids), streamer=streamer, **settings)
        else:
            made, spoken = speculating.generate(model, ids, prepared.drafting, streamer=streamer, settings=settings)
    new = made[0, ids.shape[1] :].tolist()
    return Generation(
        text=str(source.tokenizer.decode(new, skip_special_tokens=True)),
        prompt_tokens=ids.shape[1],
        new_tokens=len(new),
        finish="stop" if new[-1] in _end_tokens(model) else "length",
        chat=chat,
        first_token_seconds=times[1] - start,
        tokens_per_second=(len(new) - 1) / (times[-1] - times[1]) if len(new) > 1 else None,
        threads=torch.get_num_threads(),
        runtime=describe_runtime(model),
        drafting=prepared.report(spoken) if prepared else None,
    )


def _settings(request: GenerationRequest, max_new_tokens: int) -> dict[str, Any]:
    """Return the options of `model.generate` for a request."""
    draw: dict[str, float | None]
    if request.temperature:
        draw = {"temperature": request.temperature, "top_p": request.top_p}
    else:  # settings that the model brings for drawing do not belong to a greedy run
        draw = {"temperature": None, "top_p": None, "top_k": None}
    return {"max_new_tokens": max_new_tokens, "do_sample": bool(request.temperature), **draw}


def _encode(source: ModelSource, request: GenerationRequest) -> tuple[torch.Tensor, bool]:
    """Return the prompt as ids [1, tokens], and whether it is in the chat template."""
    if not request.prompt.strip():
        raise UsageError("the prompt is empty", hint="Give one with --prompt TEXT, or on standard input.")
    tokenizer = source.tokenizer
    templated = bool(getattr(tokenizer, "chat_template", None))
    if request.chat and not templated:
        raise UsageError(f"{source.name} has no chat template", hint="Use --no-chat.")
    chat = templated if request.chat is None else request.chat
    if chat:
        messages = [{"role": "user", "content": request.prompt}]
        ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"]
    else:
        ids = tokenizer(request.prompt)["input_ids"]
    vocabulary = source.config.get_text_config().vocab_size
    if not ids or max(ids) >= vocabulary:
        raise ModelError(
            f"the tokenizer makes {'no token' if not ids else f'token {max(ids)}'} of this prompt, "
            f"the model's vocabulary has {vocabulary}",
            where=str(source.folder),
            hint="The tokenizer files belong to another model.",
        )
    return torch.tensor([ids]), chat


def _timed_streamer(
    tokenizer: PreTrainedTokenizerBase, write: Callable[[str], None]
) -> tuple[list[float], TextStreamer]:
    """Return a streamer that writes text, and the list in which it notes when the prompt and each token came."""
    from transformers import TextStreamer

    times: list[float] = []

    class Timed(TextStreamer):  # type: ignore[misc]
        def put(self, value: torch.Tensor) -> None:
            times.append(time.perf_counter())
            super().put(value)

        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            write(text)

    return times, Timed(tokenizer, skip_prompt=True, skip_special_tokens=True)


def _end_tokens(model: Any) -> list[int]:
    """Return the ids that end a text."""
    end = model.generation_config.eos_token_id
    return end if isinstance(end, list) else [] if end is None else [end]

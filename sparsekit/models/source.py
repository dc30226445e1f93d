"""Opening a model: a Hub id, a local folder or a GGUF file. The one loader, with the one trust gate.

Nothing is executed from a model's files unless the user asked for it on the command line, and pickle files are
never read.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub.errors import StrictDataclassError

from sparsekit.checkpoint.shapes import holds_packed
from sparsekit.checkpoint.source import WeightFiles, is_ours, open_weights
from sparsekit.errors import ModelError, RemoteCodeRefused, UnsupportedFamily, UsageError
from sparsekit.lazy import require_address_space, torch
from sparsekit.memory import release_freed
from sparsekit.models.gguf import import_gguf
from sparsekit.models.lazy_model import LazyModel
from sparsekit.models.raw import torch_dtype
from sparsekit.progress import Reporter

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

DTYPES = ("auto", "bf16", "fp16", "fp32")
_TORCH_NAMES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
_TOKENIZER_FILES = ("tokenizer*", "vocab.*", "merges.txt", "*.model", "*.tiktoken")
_SHOWN = 160  # characters of another library's message
_CONFIG_ERRORS = (
    ArithmeticError, AssertionError, AttributeError, ImportError, LookupError, OSError, RuntimeError, TypeError,
    ValueError, StrictDataclassError,
)  # fmt: skip
_DOWNLOAD = ["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja", "*.md", "*.py", "LICENSE*", "NOTICE*"]


@dataclass(frozen=True)
class ModelSource:
    """A model on disk: configuration and headers checked, no weight read.

    Attributes:
        name: What the user called it.
        label: Last part of the name, for output folders and titles.
        folder: Local folder with config, tokenizer and safetensors.
        weights: The checked weight files.
        config: The transformers configuration.
        dtype: Dtype the model computes in.
        cast: Whether the user chose that dtype, so that the output is written in it.
        revision: Commit of a Hub model, else None.
        trust_remote_code: Whether code of the model may run.
    """

    name: str
    label: str
    folder: Path
    weights: WeightFiles
    config: PretrainedConfig
    dtype: torch.dtype
    cast: bool
    revision: str | None
    trust_remote_code: bool

    @property
    def packed(self) -> bool:
        """Whether pruned weights are stored packed."""
        return _packed(self.weights, self.config)

    def lazy(self) -> LazyModel:
        """Build the model with no block loaded.

        Raises:
            ModelError: The configuration makes no causal language model, or the checkpoint is packed.
            UnsupportedFamily: Its blocks cannot be found.
        """
        if self.packed:
            raise ModelError(
                "the checkpoint is packed",
                where=str(self.folder),
                hint="Make it dense first: sparsekit convert FOLDER --to dense -o OUT",
            )
        try:
            return LazyModel(
                self.weights, self.config, self.dtype, cast=self.cast, trust_remote_code=self.trust_remote_code
            )
        except _CONFIG_ERRORS as error:  # whatever a constructor does with sizes and names that make no sense
            raise ModelError(
                f"no causal language model can be built from this configuration: {type(error).__name__}: "
                f"{_short(error)}",
                where=str(self.folder / "config.json"),
                hint="Fetch config.json again, or check what was changed in it.",
            ) from error

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The model's tokenizer.

        Raises:
            ModelError: The folder holds none.
        """
        from transformers import AutoTokenizer

        try:
            return AutoTokenizer.from_pretrained(self.folder, trust_remote_code=self.trust_remote_code)
        except Exception as error:  # whatever a damaged tokenizer file raises
            found = sorted(path.name for pattern in _TOKENIZER_FILES for path in self.folder.glob(pattern))
            what = f"cannot be read: {type(error).__name__}: {_short(error)}" if found else "is not there"
            raise ModelError(
                f"the tokenizer ({', '.join(found) or 'such as tokenizer.json'}) {what}",
                where=str(self.folder),
                hint="Put the tokenizer files of the original model beside the weights.",
            ) from error

    def forget_tokenizer(self) -> None:
        """Free the tokenizer, tens of megabytes for a large vocabulary; it is read again when it is asked for."""
        self.__dict__.pop("tokenizer", None)
        release_freed()

    @property
    def max_length(self) -> int:
        """Longest sequence the model was made for, in tokens."""
        for name in ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length"):
            value = getattr(self.config, name, None)
            if isinstance(value, int) and value > 0:
                return value
        return 1 << 62  # no stated limit (ALiBi models)

    def identity(self) -> dict[str, Any]:
        """Return what makes this the same model again: dtype and the sha256 of config and weights."""
        from sparsekit.fs import sha256_file

        files = {name: record.sha256 for name, record in self.weights.fingerprints().items()}
        files["config.json"] = sha256_file(self.folder / "config.json").sha256
        return {"dtype": str(self.dtype).removeprefix("torch."), "files": dict(sorted(files.items()))}

    def load(self, *, packed: bool = False) -> PreTrainedModel:
        """Load the whole model for inference with plain `from_pretrained`, and the gates beside it, if there are any.

        Args:
            packed: Let layers multiply with packed weights where the checkpoint and this installation have what that
                takes. Otherwise they are unpacked, bit for bit the dense model: what an evaluation measures is then
                the pruning, not the kernels.
        """
        from transformers import AutoModelForCausalLM
        from transformers.utils import logging as transformers_logging

        from sparsekit.runtime import gates

        transformers_logging.disable_progress_bar()
        if self.packed and not packed:
            self.config.quantization_config["dequantize"] = True
        model, report = AutoModelForCausalLM.from_pretrained(
            self.folder,
            config=self.config,
            dtype=self.dtype,
            trust_remote_code=self.trust_remote_code,
            output_loading_info=True,
        )
        if report["missing_keys"] or report["mismatched_keys"]:
            names = sorted(str(key) for key in (*report["missing_keys"], *report["mismatched_keys"]))
            raise ModelError(
                f"{len(names)} tensors are missing or of the wrong shape, first {names[0]}",
                where=str(self.folder),
                hint="The checkpoint is incomplete, or config.json belongs to another model.",
            )
        model.eval()
        model.requires_grad_(False)
        if not gates.attached(model):  # of a packed checkpoint they come with the weights
            gates.attach_folder(model, self.folder, kernels=packed)
        return model


def open_model(
    name: str, reporter: Reporter, *, revision: str | None = None, dtype: str = "auto", trust_remote_code: bool = False
) -> ModelSource:
    """Find a model and check everything that can be checked without reading weights.

    Args:
        name: Hub id, local folder, or `.gguf` file.
        reporter: Told about downloads and conversions.
        revision: Branch, tag or commit of a Hub model.
        dtype: `auto` keeps the checkpoint's; or bf16, fp16, fp32.
        trust_remote_code: Allow code of the model to run.

    Raises:
        ModelError, RemoteCodeRefused, UnsupportedFamily, CheckpointError: with what is wrong and what to do.
    """
    if dtype not in DTYPES:
        raise UsageError(f"--dtype {dtype}: choose one of {', '.join(DTYPES)}")
    require_address_space()
    path = Path(name).expanduser()
    commit: str | None = None
    if path.suffix == ".gguf" and not path.is_dir():
        folder = import_gguf(path, "bf16" if dtype == "auto" else dtype, reporter)
        label = path.stem
    elif path.is_dir():
        folder, label = path, path.resolve().name
    else:
        folder, commit = _download(name, path, revision, reporter)
        label = name.rpartition("/")[2]
    config = _read_config(folder, trust_remote_code)
    weights = open_weights(folder)
    return ModelSource(
        name=name,
        label=label,
        folder=folder,
        weights=weights,
        config=config,
        dtype=_dtype(weights, config, dtype, folder),
        cast=dtype != "auto",
        revision=commit,
        trust_remote_code=trust_remote_code,
    )


def _download(name: str, path: Path, revision: str | None, reporter: Reporter) -> tuple[Path, str]:
    looks_local = path.is_absolute() or name.startswith((".", "~")) or path.exists() or not _HUB_ID.fullmatch(name)
    if looks_local:
        found = "is a file" if path.is_file() else "does not exist"
        raise ModelError(
            f"{name} {found}; need a folder with config.json and safetensors, a .gguf file, or a Hub id",
            hint="Check the path.",
        )
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled

    reporter.note(f"fetching {name} from the Hub")
    try:
        folder = Path(snapshot_download(name, revision=revision, allow_patterns=_DOWNLOAD))
    except (LocalEntryNotFoundError, OfflineModeIsEnabled, ConnectionError, OSError) as error:
        if isinstance(error, HfHubHTTPError) and error.response is not None and error.response.status_code < 500:
            raise ModelError(
                f"the Hub has no model {name!r} that this token may read ({_short(error)})",
                hint="Check the name and revision, and HF_TOKEN for gated models.",
            ) from error
        raise ModelError(
            f"model {name!r} is neither a local folder nor in the cache, and the Hub cannot be reached "
            f"({type(error).__name__})",
            hint="Give a local folder or a .gguf file, or try again with a connection (HF_HUB_OFFLINE unset).",
        ) from error
    return folder, folder.name


def _read_config(folder: Path, trust_remote_code: bool) -> PretrainedConfig:
    from transformers import AutoConfig

    file = folder / "config.json"
    if not file.is_file():
        raise ModelError("no config.json", where=str(folder), hint="Need a Hugging Face model folder.")
    raw = _read_json(file)
    for settings in (file, folder / "tokenizer_config.json"):
        if settings.is_file() and "auto_map" in _read_json(settings) and not trust_remote_code:
            raise RemoteCodeRefused(
                "the model wants to run its own code (auto_map)",
                where=str(settings),
                hint="Read that code; if you trust it, add --trust-remote-code.",
            )
    quantization = raw.get("quantization_config")
    method = quantization.get("quant_method", "unknown") if isinstance(quantization, dict) else quantization
    if quantization and method != "sparsekit":
        raise ModelError(
            f"the checkpoint is quantised ({method})",
            where=str(file),
            hint="Prune the original bf16, fp16 or fp32 checkpoint.",
        )
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except _CONFIG_ERRORS as error:
        raise _unusable_config(raw.get("model_type"), file, error) from error
    if getattr(config, "is_encoder_decoder", False):
        raise UnsupportedFamily(
            f"{config.model_type} is an encoder-decoder model", where=str(file), hint="Need a causal language model."
        )
    return config


def _unusable_config(model_type: object, file: Path, error: BaseException) -> ModelError:
    from transformers import CONFIG_MAPPING, __version__

    if model_type not in CONFIG_MAPPING:
        known = f"model_type {model_type!r} is unknown to transformers {__version__}"
        return ModelError(
            known if model_type is not None else "no model_type in it",
            where=str(file),
            hint="Check the name, or update transformers.",
        )
    return ModelError(
        f"transformers {__version__} cannot use this {model_type} configuration: {_short(error)}",
        where=str(file),
        hint="Fetch config.json again, or check what was changed in it.",
    )


def _read_json(file: Path) -> dict[str, Any]:
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError, OSError) as error:
        raise ModelError(
            f"not readable as JSON: {_short(error)}", where=str(file), hint="Fetch this file of the model again."
        ) from error
    if not isinstance(value, dict):
        raise ModelError(
            f"need a JSON object, got {type(value).__name__}",
            where=str(file),
            hint="Fetch this file of the model again.",
        )
    return value


def _dtype(weights: WeightFiles, config: PretrainedConfig, wanted: str, folder: Path) -> torch.dtype:
    """Return the asked dtype, or the one that most bytes of the checkpoint are stored in."""
    if wanted != "auto":
        chosen: torch.dtype = getattr(torch, _TORCH_NAMES[wanted])
        return chosen
    if _packed(weights, config):
        known: torch.dtype | None = getattr(config, "dtype", None)
        return known or torch.float32
    sizes: dict[str, int] = {}
    for location in weights.tensors.values():
        entry = location.entry
        sizes[entry.dtype] = sizes.get(entry.dtype, 0) + entry.end - entry.start
    stored = max(sorted(sizes), key=lambda name: sizes[name])
    dtype = torch_dtype(stored)
    if dtype not in (torch.bfloat16, torch.float16, torch.float32):
        raise ModelError(
            f"weights are stored as {stored}; need BF16, F16 or F32",
            where=str(folder),
            hint="Prune the unquantised checkpoint.",
        )
    return dtype


def _packed(weights: WeightFiles, config: PretrainedConfig) -> bool:
    """Whether weights are packed; files that carry our names may be narrow alone."""
    return is_ours(weights.files) and holds_packed(getattr(config, "quantization_config", {}))


def _short(error: BaseException) -> str:
    """Return the beginning of another library's message on one line."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN].rsplit(' ', 1)[0]} ..."

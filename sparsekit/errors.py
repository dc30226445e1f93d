"""Every exception sparsekit raises on purpose, and the exit code each one ends the command with.

A message is one line: what is wrong, where, got versus needed. `hint` says what to do next; the command line
prints it after the message. Nothing outside this module defines an exception.
"""

from __future__ import annotations


class SparsekitError(Exception):
    """Base of all expected errors.

    Args:
        message: What is wrong, with got versus needed.
        where: File, tensor, layer or recipe position; put in front of the message.
        hint: What the user can do next, as an imperative sentence.
    """

    exit_code = 70

    def __init__(self, message: str, *, where: str | None = None, hint: str | None = None) -> None:
        self.message = message
        self.where = where
        self.hint = hint
        super().__init__(str(self))

    def __str__(self) -> str:
        text = f"{self.where}: {self.message}" if self.where else self.message
        if not self.hint:
            return text
        return f"{text}{'' if text.endswith(('.', '?', '!')) else '.'} {self.hint}"


class UsageError(SparsekitError):
    """Options of a command that contradict each other or do not apply."""

    exit_code = 2


# --- recipes and names: exit 2 -----------------------------------------------------------------------------
class RecipeError(SparsekitError):
    """A recipe that cannot be used."""

    exit_code = 2


class RecipeSyntaxError(RecipeError):
    """The file is not the YAML subset that recipes are written in."""


class RecipeSchemaError(RecipeError):
    """A key or value the schema refuses."""


class RecipeReferenceError(RecipeError):
    """A recipe, parent or override that does not exist or may not be used."""


class PlanError(RecipeError):
    """A valid recipe that this model cannot satisfy (a pattern that does not divide a width, an impossible budget)."""


class RegistryError(SparsekitError):
    """A method name that cannot be resolved."""

    exit_code = 2


class UnknownName(RegistryError):
    """No method of that name."""


class PluginBroken(RegistryError):
    """A third-party method that fails to import or does not keep its contract."""


class NameClash(RegistryError):
    """Two distributions offer the same method name."""


# --- checkpoints: exit 3 -----------------------------------------------------------------------------------
class CheckpointError(SparsekitError):
    """A checkpoint file that is damaged, incomplete or unsafe."""

    exit_code = 3


class HeaderError(CheckpointError):
    """A safetensors header that breaks the format."""


class TruncatedError(CheckpointError):
    """A file shorter or longer than its header or manifest says."""


class ChecksumError(CheckpointError):
    """A file whose content is not what the manifest recorded."""


class IndexMismatch(CheckpointError):
    """Index, shards and manifest disagree."""


class UnsafePath(CheckpointError):
    """A path in a file that leaves the folder it belongs to."""


class UnsafeFormat(CheckpointError):
    """A file format that can execute code when it is loaded."""


class VersionError(CheckpointError):
    """A file written by a newer, unknown format version."""


class MaskError(SparsekitError):
    """Mask, weights and claimed pattern disagree."""

    exit_code = 3


class ShapeMismatch(MaskError):
    """A mask or pruned weight whose shape is not the linear's."""


class WeightMismatch(MaskError):
    """A weight that is not zero where the mask removes it, or a kept count off the budget."""


class PatternViolation(MaskError):
    """A mask that breaks its pattern."""


# --- packed tensors and kernels ----------------------------------------------------------------------------
class KernelError(SparsekitError):
    """A packed tensor that no kernel may see, or a machine without a kernel for it."""

    exit_code = 3


class BadIndex(KernelError):
    """An index, offset or code in a packed tensor that would lead a kernel astray."""


class KernelsMissing(KernelError):
    """The compiled kernels are not installed or cannot be loaded."""

    exit_code = 5


class UnsupportedCPU(KernelError):
    """An instruction set that this processor or this build does not have."""

    exit_code = 5


# --- models and data: exit 3 -------------------------------------------------------------------------------
class ModelError(SparsekitError):
    """A model that cannot be opened or handled."""

    exit_code = 3


class UnsupportedFamily(ModelError):
    """An architecture whose blocks or linears cannot be found."""


class LowCoverage(ModelError):
    """The recipe's targets cover less of the model than it asks for."""


class RemoteCodeRefused(ModelError):
    """A model that wants to run its own code without --trust-remote-code."""


class CalibrationError(SparsekitError):
    """Calibration or evaluation text that cannot be used."""

    exit_code = 3


class EmptyText(CalibrationError):
    """No usable text in a source."""


class TooFewTokens(CalibrationError):
    """A source with fewer tokens than asked for."""


class SourceUnavailable(CalibrationError):
    """A source that does not exist or cannot be reached."""


class EvaluationError(SparsekitError):
    """An evaluation task that does not exist or fails."""

    exit_code = 3


# --- numbers: exit 4 ---------------------------------------------------------------------------------------
class NonFinite(CalibrationError):
    """NaN or infinity in weights, activations, statistics or scores."""

    exit_code = 4


class NumericalError(SparsekitError):
    """A computation that has no trustworthy result."""

    exit_code = 4


# --- resources: exit 5 -------------------------------------------------------------------------------------
class ResourceError(SparsekitError):
    """The machine does not have what the run needs."""

    exit_code = 5


class DiskFull(ResourceError):
    """Not enough free space."""


class OutOfMemory(ResourceError):
    """Not enough memory."""


class PermissionRefused(ResourceError):
    """A file or folder that may not be read or written."""


class MissingExtra(ResourceError):
    """A feature whose optional dependency is not installed."""


class WorkerLost(ResourceError):
    """A process that worked for this one and died, or does not answer."""


# --- runs --------------------------------------------------------------------------------------------------
class RunError(SparsekitError):
    """A run that cannot start or go on."""

    exit_code = 3


class OutputExists(RunError):
    """A non-empty output folder without --overwrite."""

    exit_code = 2


class ResumeMismatch(RunError):
    """An interrupted run whose recipe, model, data or version is not the one asked for now."""


class Locked(RunError):
    """Another process is writing the same output."""

    exit_code = 5


class Interrupted(RunError):
    """Stopped by the user; the same command goes on."""

    exit_code = 130


class GateMissed(SparsekitError):
    """A quality gate of the recipe or command line was not met."""

    exit_code = 6

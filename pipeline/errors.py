"""Everything that can go wrong, and what it means to the person who sees it.

ResegError                exit
├ ConfigError              2    wrong path, pattern, option, bundle or results folder
│ ├ SourceError            2    the source cannot be listed, or holds nothing to segment
│ ├ BundleError            2    the bundle or the weights cannot be used
│ └ ResultsError           2    the results folder is not usable, or belongs to something else
├ StoreFailed              1    the object store does not answer, or refuses the credentials; resumable
├ StageFailed              1    a worker failed more often than it may; resumable
├ Busy                     1    another process works in this folder; wait for it
├ CommitConflict           1    somebody else published first; nothing of ours is visible
├ VerificationError        1    what was written is not what was planned; nothing published
├ RunStalled               1    no progress for too long; names the stage
├ TooManyBadImages         3    finished, but over the allowed share of bad images
└ GateRefused              4    finished, but over a limit of the gate; last night stays published

BadImage                   -    one image, never a run: becomes a row with an `ErrorClass`
"""

from enum import StrEnum
from typing import ClassVar


class ErrorClass(StrEnum):
    """Why an image has no good row. The documented list; `masks.error_class` holds one of these."""

    # the file
    EMPTY_FILE = "EmptyFile"
    NOT_AN_IMAGE = "NotAnImage"
    UNSUPPORTED_FORMAT = "UnsupportedFormat"
    TRUNCATED_IMAGE = "TruncatedImage"
    CORRUPT_IMAGE = "CorruptImage"
    IMAGE_TOO_LARGE = "ImageTooLarge"
    IMAGE_TOO_SMALL = "ImageTooSmall"
    NON_FINITE_PIXELS = "NonFinitePixels"
    UNREADABLE_FILE = "UnreadableFile"
    CHANGED_DURING_RUN = "ChangedDuringRun"
    CHECKSUM_MISMATCH = "ChecksumMismatch"
    # the decoder
    DECODER_CRASHED = "DecoderCrashed"
    DECODER_TIMEOUT = "DecoderTimeout"
    # the image among its neighbours, and against the model
    SLICE_SHAPE_MISMATCH = "SliceShapeMismatch"
    CHANNEL_MISMATCH = "ChannelMismatch"
    CASE_TOO_LARGE = "CaseTooLarge"
    NON_FINITE_LOGITS = "NonFiniteLogits"
    # the reference mask
    MISSING_IMAGE = "MissingImage"
    MISSING_MASK = "MissingMask"
    MASK_SIZE_MISMATCH = "MaskSizeMismatch"
    MASK_NOT_CATEGORICAL = "MaskNotCategorical"
    CLASS_OUT_OF_RANGE = "ClassOutOfRange"
    BAD_MASK = "BadMask"
    # the shard
    DUPLICATE_KEY = "DuplicateKey"
    UNSAFE_PATH = "UnsafePath"
    TRUNCATED_ARCHIVE = "TruncatedArchive"
    CORRUPT_ARCHIVE = "CorruptArchive"
    ARCHIVE_TOO_LARGE = "ArchiveTooLarge"
    SCHEMA_MISMATCH = "SchemaMismatch"
    CORRUPT_PARQUET = "CorruptParquet"


REFERENCE_ERRORS = frozenset(
    {
        ErrorClass.MISSING_MASK,
        ErrorClass.MASK_SIZE_MISMATCH,
        ErrorClass.MASK_NOT_CATEGORICAL,
        ErrorClass.CLASS_OUT_OF_RANGE,
        ErrorClass.BAD_MASK,
    }
)
"""The image is fine and has a predicted mask; only its reference cannot be used."""

RETRIED_ERRORS = frozenset(
    {
        ErrorClass.UNREADABLE_FILE,
        ErrorClass.CHANGED_DURING_RUN,
        ErrorClass.DECODER_CRASHED,
        ErrorClass.DECODER_TIMEOUT,
    }
)
"""Causes outside the image: the next run tries again although its bytes have not changed."""


class ResegError(Exception):
    """Root of all errors that end a command with one sentence instead of a traceback."""

    exit_code: ClassVar[int] = 1


class ConfigError(ResegError):
    """The request cannot be carried out as written: what is wrong, the value, what to set."""

    exit_code = 2


class SourceError(ConfigError):
    """The source cannot be listed, or holds nothing to segment."""


class BundleError(ConfigError):
    """A bundle or a weights file is damaged, hostile or of another architecture."""

    def __init__(self, message: str, *, error_class: str = "BundleError") -> None:
        super().__init__(message)
        self.error_class = error_class


class ResultsError(ConfigError):
    """The results folder cannot be used for this run, or does not hold what was asked for."""


class StoreFailed(ResegError):
    """The object store does not answer, or refuses the credentials; never a missing file."""


class StageFailed(ResegError):
    """A stage of the flow failed more often than it may; what is done is kept."""


class Busy(ResegError):
    """Another process works in this folder, and two would do the same work twice."""


class CommitConflict(ResegError):
    """Another run published first; what this run staged is not visible and not lost."""


class VerificationError(ResegError):
    """The parts on the store do not add up to the plan; nothing is published."""


class RunStalled(ResegError):
    """No stage moved for the allowed time."""


class TooManyBadImages(ResegError):
    """The run is complete, but more of its images are bad than the caller allows."""

    exit_code = 3


class GateRefused(ResegError):
    """The night is computed and kept for inspection, but a limit of the gate is not kept."""

    exit_code = 4


class BadImage(Exception):
    """One image cannot be used. Caught where the image is, and turned into a row."""

    def __init__(self, error_class: ErrorClass, message: str) -> None:
        super().__init__(message)
        self.error_class = error_class
        self.message = message

"""What syncbn raises. One root class, so that `except SyncBatchNormError` catches all that the library says itself."""

__all__ = [
    "BackendError",
    "CollectiveError",
    "ConversionError",
    "DTypeError",
    "GroupError",
    "InputError",
    "KernelsError",
    "LaunchError",
    "MismatchError",
    "PeerLostError",
    "SyncBatchNormError",
]


class SyncBatchNormError(Exception):
    """Root of every error of this library."""


class InputError(SyncBatchNormError, ValueError):
    """A tensor or number that cannot be normalised: wrong rank, channel count or value."""


class DTypeError(SyncBatchNormError, TypeError):
    """A tensor whose dtype cannot be normalised or communicated."""


class GroupError(SyncBatchNormError, ValueError):
    """A process group that is unknown, was lost by pickling, or does not contain this rank."""


class CollectiveError(SyncBatchNormError, RuntimeError):
    """A collective failed, and with it the communicator."""


class MismatchError(CollectiveError):
    """The ranks ask for different sums: another layer, direction, call or number of channels. Raised on every rank."""


class PeerLostError(CollectiveError):
    """A peer died, ended, or does not call within the communicator's deadline."""


class ConversionError(SyncBatchNormError, TypeError):
    """A module that cannot be converted without changing what the model computes."""


class LaunchError(SyncBatchNormError, RuntimeError):
    """The environment variables of the launcher are incomplete or contradict each other."""


class BackendError(SyncBatchNormError, ImportError):
    """An optional package (mpi4py, horovod) or one of its features is missing."""


class KernelsError(SyncBatchNormError, RuntimeError):
    """SYNCBN_KERNELS names kernels that are unknown, cannot be had, or do not work where the tensors are."""

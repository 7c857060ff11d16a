"""Communicators: "sum this vector over the replicas", over whatever connects them. Knows nothing of batch norm."""

from ._distributed import TorchDistributed as TorchDistributed
from ._horovod import Horovod as Horovod
from ._mpi import MPI as MPI
from ._protocol import Communicator as Communicator
from ._shared_memory import SharedMemory as SharedMemory
from ._single import SingleProcess as SingleProcess
from ._threads import run_threads as run_threads

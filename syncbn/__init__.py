"""Synchronised batch normalisation: P small batches train exactly like one large batch.

Start the job with torchrun, mpirun, horovodrun or srun, and in the script::

    comm = syncbn.init()
    model = syncbn.convert_sync_batchnorm(model)
"""

from . import comm as comm
from . import errors as errors
from . import functional as functional
from ._block import together as together
from ._conversion_report import ConversionReport as ConversionReport
from ._convert import convert_sync_batchnorm as convert_sync_batchnorm
from ._convert import revert_sync_batchnorm as revert_sync_batchnorm
from ._convert import reverted as reverted
from ._fusion import fuse_activations as fuse_activations
from ._in_sync import assert_in_sync as assert_in_sync
from ._launcher import init as init
from ._layer import SyncBatchNorm as SyncBatchNorm
from ._mask import valid_positions as valid_positions
from ._name_layers import name_layers as name_layers
from ._parallel import average_gradients as average_gradients
from ._parallel import broadcast_parameters as broadcast_parameters
from ._parallel import global_mean as global_mean
from ._population import recompute_statistics as recompute_statistics
from ._population import synchronize_statistics as synchronize_statistics
from ._saved import saved_statistics as saved_statistics
from ._together import normalize_together as normalize_together
from ._torch_conversion import replace_torch_conversion as replace_torch_conversion
from ._uneven import uneven as uneven
from .comm._groups import world as world

__version__ = "0.2.0"

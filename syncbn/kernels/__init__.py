"""Kernels: the work on one replica's tensor. Knows nothing of replicas."""

from ._protocol import Kernels as Kernels
from ._select import composed_only as composed_only
from ._select import kernels_for as kernels_for

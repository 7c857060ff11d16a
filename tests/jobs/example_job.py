"""Runs an example in float64 and prints its last loss with all digits: example_job.py [local] SCRIPT

With `local` the batch norm layers stay what they are, for the negative control.
"""

import runpy
import sys

import torch

import syncbn

*options, script = sys.argv[1:]
torch.set_default_dtype(torch.float64)
if options == ["local"]:
    syncbn.convert_sync_batchnorm = lambda model: model
loss = runpy.run_path(script, run_name="__main__")["loss"].item()
sys.stdout.write(f"last loss {loss!r}\n")
sys.stdout.flush()

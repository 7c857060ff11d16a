"""Started by a real launcher: trains on different numbers of batches, and compares with one process.

Arguments: HOW COUNTS ..., an epoch each: `average 5,3,2 2,3,0`. HOW is "average" (average_gradients), "ddp" or
"ddp-broadcasts" (broadcast_buffers=True), "horovod" (DistributedOptimizer). Prints the largest difference.
"""

import sys
import warnings
from datetime import timedelta
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from torch.nn.parallel import DistributedDataParallel
from unequal import batch, largest_difference, loss_of, made, momentum_of, reference

import syncbn

how, *texts = sys.argv[1:]
epochs = [[int(count) for count in text.split(",")] for text in texts]
torch.set_num_threads(1)
comm = syncbn.init(timeout=timedelta(seconds=60))
model = syncbn.convert_sync_batchnorm(made())
optimizer = momentum_of(model)
called, joinables = model, ()
if how.startswith("ddp"):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch 2.13 deprecates broadcast_buffers
        called = DistributedDataParallel(model, broadcast_buffers=how == "ddp-broadcasts")
    joinables = (called,)
if how == "horovod":
    import horovod.torch as hvd

    optimizer = hvd.DistributedOptimizer(optimizer, named_parameters=model.named_parameters())

for epoch, counts in enumerate(epochs):
    with syncbn.uneven(model, *joinables, optimizer=optimizer):
        for step in range(counts[comm.rank]):
            x = batch(epoch, step, comm.rank)
            optimizer.zero_grad()
            syncbn.global_mean(loss_of(called(x)), len(x)).backward()
            if how == "average":
                syncbn.average_gradients(model)
            optimizer.step()
difference = largest_difference(model, reference(epochs))
sys.stdout.write(f"rank {comm.rank} of {comm.size}: largest difference {difference:.1e}\n")
sys.stdout.flush()
assert difference < 1e-9, difference

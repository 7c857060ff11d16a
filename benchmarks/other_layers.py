"""What synchronised layers of other libraries do on a CPU: the runs behind docs/why.md.

    python benchmarks/other_layers.py                    # torch, syncbn, and what else is installed of the following

    pip install jax flax tensorflow-cpu keras            # into environments of their own, without torch or syncbn
    pip install paddlepaddle
    pip install --no-deps fvcore                         # beside torch: the all-reduce of detectron2's layer

Each value's mean is a number of standard deviations away from zero: the variance's relative error, the worst of 4
channels, 2 replicas of 512 values each, float32.
"""

from __future__ import annotations

import importlib.util
import os
import tempfile
from collections.abc import Callable
from importlib.metadata import version
from typing import Any

import numpy as np

RATIOS = (1.0, 1e2, 1e3, 1e4)


def says(library: str, what: str, result: Any) -> None:
    """Print a finding."""
    print(f"{library} {version(library)} | {what} | {result}", flush=True)


def attempt(f: Callable[[], Any]) -> str:
    """What `f` does: "works", or its error."""
    try:
        f()
    except Exception as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        told = [line for line in lines if "Error" in line or "not registered" in line] or lines
        return f"{type(error).__name__}: {told[-1][:120]}"
    return "works"


def batch(ratio: float) -> np.ndarray:
    """Values of a standard deviation of 1, channels last: (16, 8, 8, 4)."""
    return (np.random.default_rng(0).standard_normal((16, 8, 8, 4)) + ratio).astype(np.float32)


def errors(library: str, what: str, variance: Callable[[np.ndarray], Any]) -> None:
    """Print the error of `variance(batch)` at each ratio, and where it is 0 for some channel."""
    told = []
    for ratio in RATIOS:
        x = batch(ratio)
        true = x.astype(np.float64).var((0, 1, 2))
        found = np.asarray(variance(x), np.float64)
        told.append(f"{np.abs(found / true - 1).max():.1e}" + " (0 in one)" * bool((found <= 0).any()))
    says(library, f"variance error at mean/std = {', '.join(f'{r:g}' for r in RATIOS)}, {what}", ", ".join(told))


def with_syncbn() -> None:
    import torch

    from syncbn.comm import run_threads
    from syncbn.functional import sync_batch_norm

    def variance(x: np.ndarray) -> Any:
        rows = torch.from_numpy(x).permute(0, 3, 1, 2)

        def replica(comm: Any) -> Any:
            mean, var = torch.zeros(2, 4, dtype=torch.float64)
            sync_batch_norm(rows[comm.rank :: 2], mean, var, momentum=1.0, process_group=comm)
            return var * 1023 / 1024

        return run_threads(2, replica)[0]

    def naive(x: np.ndarray) -> Any:
        rows = torch.from_numpy(x)
        return rows.square().mean((0, 1, 2)) - rows.mean((0, 1, 2)).square()

    errors("syncbn", "default", variance)
    errors("torch", "mean(x²) - mean(x)² in float32", naive)


def with_torch() -> None:
    import torch
    from torch import nn
    from torch.nn.parallel import DistributedDataParallel

    class Activated(nn.BatchNorm2d):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x).relu()

    shared = nn.BatchNorm2d(3)
    shared.register_forward_hook(lambda *_: None)
    model = nn.Sequential(Activated(3), shared, nn.Sequential(shared)).eval()
    made = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    x = torch.randn(2, 3, 4, 4)
    says("torch", "conversion keeps a subclass's activation", bool((made[0](x) >= 0).all()))
    says("torch", "conversion keeps hooks", len(made[1]._forward_hooks) == 1)
    says("torch", "conversion keeps a shared layer shared", made[1] is made[2][0])
    says("torch", "what it converts to is a BatchNorm2d", isinstance(made[1], nn.BatchNorm2d))
    if importlib.util.find_spec("horovod"):
        import horovod.torch as hvd

        hvd.init()
        for name in ("train", "eval"):
            layer = getattr(hvd.SyncBatchNorm(3), name)()
            says("horovod", f"a CPU tensor, {name}", attempt(lambda layer=layer: layer(x)))
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(two_ranks, (f"file://{folder}/meet", DistributedDataParallel), nprocs=2)


def two_ranks(rank: int, meet: str, ddp: Any) -> None:
    import torch
    import torch.distributed as dist
    from torch import nn

    dist.init_process_group("gloo", init_method=meet, rank=rank, world_size=2)
    layer, x = nn.SyncBatchNorm(3), torch.randn(2, 3, 4, 4)
    found = [("train", attempt(lambda: layer.train()(x))), ("eval", attempt(lambda: layer.eval()(x)))]
    found.append(("in DDP", attempt(lambda: ddp(layer))))
    if rank == 0:
        for what, result in found:
            says("torch", f"a CPU tensor, {what}", result)
    if importlib.util.find_spec("fvcore"):
        first, second = gradients_of_detectron2s_formula(rank)
        if rank == 0:
            says(
                "fvcore",
                "error of first and second order gradients, detectron2's formula",
                f"{first:.0e}, {second:.0e}",
            )
    dist.destroy_process_group()


def gradients_of_detectron2s_formula(rank: int) -> tuple[float, float]:
    """Relative errors against one process with the whole batch."""
    import torch
    from torch import Tensor

    folder = importlib.util.find_spec("fvcore").submodule_search_locations[0]  # its nn/__init__ wants other packages
    spec = importlib.util.spec_from_file_location("distributed", os.path.join(folder, "nn", "distributed.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    torch.manual_seed(0)
    xs, gs = torch.randn(2, 2, 4, 3, dtype=torch.float64)

    def orders(x: Tensor, g: Tensor, mean_of: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
        x = x.clone().requires_grad_()
        mean, square = mean_of(torch.cat([x.mean(0), x.square().mean(0)])).chunk(2)
        y = (x - mean) * torch.rsqrt(square - mean.square() + 1e-5)
        (first,) = torch.autograd.grad((y * g).sum(), x, create_graph=True)
        kept = first.detach().clone()
        return kept, torch.autograd.grad(first.square().sum(), x)[0]

    ours = orders(xs[rank], gs[rank], lambda v: module.differentiable_all_reduce(v) / 2)
    whole = orders(xs.flatten(0, 1), gs.flatten(0, 1), lambda v: v)
    return tuple(float((a - b[4 * rank :][:4]).norm() / b.norm()) for a, b in zip(ours, whole, strict=True))


def with_flax() -> None:
    os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=2"
    import flax.linen as nn
    import jax
    from jax.sharding import Mesh, PartitionSpec

    mesh, part, whole = Mesh(np.array(jax.devices()), ("d",)), PartitionSpec("d"), PartitionSpec()

    def on_both(f: Any, *arguments: Any, out: Any = part, parts: Any = part) -> Any:
        return jax.jit(jax.shard_map(f, mesh=mesh, in_specs=parts, out_specs=out, check_vma=False))(*arguments)

    def layer(**options: Any) -> Any:
        norm = nn.BatchNorm(use_running_average=False, momentum=0.0, **options)
        state = norm.init(jax.random.key(0), batch(1)[:1])
        return lambda x, mask=None: norm.apply(state, x, mask=mask, mutable=["batch_stats"])

    for fast in (True, False):
        norm = layer(axis_name="d", use_fast_variance=fast)
        errors(
            "flax",
            f"use_fast_variance={fast}",
            lambda x, n=norm: on_both(lambda x: n(x)[1], x, out=whole)["batch_stats"]["var"],
        )
    x, g = batch(1), np.random.default_rng(1).standard_normal((16, 8, 8, 4)).astype(np.float32)

    def second(norm: Any, x: Any, g: Any) -> Any:
        first = jax.grad(lambda x: (norm(x)[0] * g).sum())
        return jax.grad(lambda x: (first(x) ** 2).sum())(x)

    ours = on_both(lambda x, g: second(layer(axis_name="d"), x, g), x, g)
    alone = second(layer(), x, g)
    says(
        "flax",
        "relative error of second order gradients",
        f"{np.linalg.norm(ours - alone) / np.linalg.norm(alone):.0e}",
    )
    compiled = jax.jit(
        jax.shard_map(
            lambda x, g: jax.grad(lambda x: (layer(axis_name="d")(x)[0] * g).sum())(x),
            mesh=mesh, in_specs=part, out_specs=part, check_vma=False,
        )
    ).lower(x, g).compile().as_text()  # fmt: skip
    sums = [
        line.split("all-reduce(")[0].split("=")[1].strip() for line in compiled.splitlines() if " all-reduce(" in line
    ]
    says("flax", "all-reduces of a forward and backward, 4 channels", sums)
    mask = np.ones((16, 8, 8, 1), bool)
    mask[8:, 2:] = False
    x[8:] += 3
    found = on_both(lambda x, m: layer(axis_name="d")(x, m)[1], x, mask, out=whole)["batch_stats"]["mean"]
    true = np.ma.array(x, mask=np.broadcast_to(~mask, x.shape)).mean((0, 1, 2))
    says("flax", "masked mean of the first channel, and the true one", f"{found[0]:.3f}, {true[0]:.3f}")


def with_keras() -> None:
    os.environ["KERAS_BACKEND"] = "tensorflow"
    os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"
    import keras
    import tensorflow as tf

    cpu = tf.config.list_physical_devices("CPU")[0]
    tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * 2)
    strategy = tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])

    def statistics(parts: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        with strategy.scope():
            norm = keras.layers.BatchNormalization(synchronized=True, momentum=0.0)
            norm.build((None, 8, 8, 4))
        values = strategy.experimental_distribute_values_from_function(
            lambda context: tf.constant(parts[context.replica_id_in_sync_group])
        )
        tf.function(lambda x: strategy.run(lambda x: norm(x, training=True), args=(x,)))(values)
        return np.asarray(norm.moving_mean), np.asarray(norm.moving_variance)

    errors("keras", "synchronized=True", lambda x: statistics([x[:8], x[8:]])[1])
    for first in (8, 4, 0):
        x = batch(1)
        x[first:] += 3
        mean, variance = statistics([x[:first], x[first:]])
        worst = max(np.abs(mean - x.mean((0, 1, 2))).max(), np.abs(variance - x.var((0, 1, 2))).max())
        says("keras", f"largest difference to the whole batch, shares of {first} and {16 - first}", f"{worst:.0e}")


def with_paddle() -> None:
    import paddle

    x = paddle.randn([2, 3, 4, 4])
    for name in ("train", "eval"):
        layer = paddle.nn.SyncBatchNorm(3)
        getattr(layer, name)()
        says("paddlepaddle", f"a CPU tensor, {name}", attempt(lambda layer=layer: layer(x)))


if __name__ == "__main__":
    for package, run in (
        ("syncbn", with_syncbn),
        ("torch", with_torch),
        ("flax", with_flax),
        ("tensorflow", with_keras),
        ("paddle", with_paddle),
    ):
        if importlib.util.find_spec(package):
            run()

"""recompute_statistics, synchronize_statistics, assert_in_sync: running statistics after training."""

import copy
import itertools

import pytest
import torch
from reference import Recording, Unreachable, assert_tensor_close, to_rows
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import syncbn
from syncbn import (
    SyncBatchNorm,
    assert_in_sync,
    convert_sync_batchnorm,
    recompute_statistics,
    synchronize_statistics,
)
from syncbn.comm import run_threads
from syncbn.errors import DTypeError, InputError

KEYS = ("running_mean", "running_var", "num_batches_tracked")


def samples(number=24, channels=3, *, mean=2.0):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(number, channels, 4, dtype=torch.float64, generator=generator)
    return x * torch.linspace(0.5, 3, number, dtype=torch.float64).view(-1, 1, 1) + mean


def _made():
    torch.manual_seed(0)
    return nn.Sequential(nn.BatchNorm1d(3), nn.Conv1d(3, 5, 2), nn.ReLU(), nn.BatchNorm1d(5)).double()


MODEL = _made()  # once: threads would draw from one generator


def network(*, comm=None, convert=False):
    """norm, convolution, norm: in float64, the same on every rank."""
    model = copy.deepcopy(MODEL)
    return convert_sync_batchnorm(model, comm) if convert else model


def statistics(model):
    return [b.clone() for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) for b in m.buffers()]


def population(rows):
    return [rows.mean(0), rows.var(0)]


def assert_statistics(layer, expected):
    for key, value in zip(KEYS, expected, strict=False):
        assert_tensor_close(getattr(layer, key), value, name=key)


def same_bits(a, b):
    return all(torch.equal(x, y) or (x.isnan() == y.isnan()).all() for x, y in zip(a, b, strict=True))


SPLITS = {  # rank by rank: sizes of its batches of 24 samples
    "one process, one batch": [[24]],
    "one process, many": [[7, 1, 16]],
    "two ranks": [[6, 6], [6, 6]],
    "unequal": [[1, 10], [3, 2], [7, 1]],
    "an empty batch": [[20, 2], [2, 0]],
}


# recompute_statistics


@pytest.mark.parametrize("split", SPLITS.values(), ids=SPLITS)
@pytest.mark.parametrize("convert", [True, False], ids=["synchronised", "plain"])
def test_the_first_norm_layer_gets_the_population_however_it_is_split(split, convert):
    parts = iter(samples().split(list(itertools.chain(*split))))
    batches = [[next(parts) for _ in sizes] for sizes in split]

    def replica(comm):
        model = network(comm=comm, convert=convert)
        assert recompute_statistics(model, batches[comm.rank], process_group=comm) is None
        return model

    models = run_threads(len(split), replica)
    assert_statistics(models[0][0], population(to_rows(samples())))
    for model in models:
        assert same_bits(statistics(model), statistics(models[0]))


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_a_later_layer_sees_what_the_whole_batch_gives_it(ranks):
    """With synchronised layers the split of a batch over ranks does not matter, in any layer."""
    whole = [samples(12), samples(6, mean=-1.0)]

    def replica(comm):
        model = network(comm=comm, convert=True)
        mine = (batch.tensor_split(ranks)[comm.rank] for batch in whole)  # a generator
        recompute_statistics(model, mine, process_group=comm)
        return model

    reference = network()
    seen = torch.cat([to_rows(reference[:3](batch)) for batch in whole])
    assert_statistics(run_threads(ranks, replica)[-1][3], population(seen))


def test_a_later_plain_layer_sees_the_ranks_own_batches():
    batches = [samples(4), samples(8, mean=-1.0)]

    def replica(comm):
        model = network()
        recompute_statistics(model, [batches[comm.rank]], process_group=comm)
        return model

    reference = network()
    seen = torch.cat([to_rows(reference[:3](batch)) for batch in batches])
    assert_statistics(run_threads(2, replica)[0][3], population(seen))


def test_what_a_layer_leaves_out_is_left_out():
    layer, x = SyncBatchNorm(3).double(), torch.randn(4, 3, 5, dtype=torch.float64)
    mask = syncbn.valid_positions([5, 2, 0, 1], x)
    recompute_statistics(layer, [x], forward=lambda x: layer(x, mask=mask))
    valid = x.movedim(1, -1)[mask[:, 0]]
    assert_tensor_close(layer.running_mean, valid.mean(0))
    assert_tensor_close(layer.running_var, valid.var(0))


class Shifted(nn.BatchNorm1d):
    def forward(self, x):
        return super().forward(x.relu() + 10)


class ByFunction(nn.BatchNorm1d):
    def forward(self, x):
        x = x.relu() + 10
        return nn.functional.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, self.training)


class Elsewhere(nn.BatchNorm1d):
    def forward(self, x):
        return nn.functional.batch_norm(x, self.running_mean.clone(), self.running_var.clone(), training=True)


@pytest.mark.parametrize("converted", [False, True])
@pytest.mark.parametrize("kind", [Shifted, ByFunction])
def test_a_forward_of_its_own_is_measured_where_it_normalises(kind, converted):
    layer, x = kind(3).double(), torch.randn(4, 3, 5, dtype=torch.float64)
    if converted:
        convert_sync_batchnorm(layer)
    recompute_statistics(nn.Sequential(layer), [x[:1], x[1:]])
    values = (x.relu() + 10).movedim(1, -1).flatten(0, 1)
    assert_tensor_close(layer.running_mean, values.mean(0))
    assert_tensor_close(layer.running_var, values.var(0))


def test_a_forward_that_does_not_say_what_it_normalises_is_refused():
    model = nn.Sequential(Elsewhere(3))
    with pytest.raises(InputError, match="0, a Elsewhere with a forward of its own, calls neither"):
        recompute_statistics(model, [torch.randn(4, 3)])
    assert torch.equal(model[0].running_mean, torch.zeros(3))


def test_layers_that_wait_are_measured():
    layers, x = nn.Sequential(SyncBatchNorm(3), SyncBatchNorm(3)).double(), torch.randn(4, 3, dtype=torch.float64)
    expected = copy.deepcopy(layers)
    recompute_statistics(layers, [x], forward=syncbn.together()(layers))
    recompute_statistics(expected, [x])
    for ours, theirs in zip(layers.buffers(), expected.buffers(), strict=True):
        assert_tensor_close(ours, theirs)


def test_nothing_else_changes():
    model = network(convert=True)
    model[3].momentum = None
    model[0].register_buffer("own", torch.ones(2))
    model(samples(12)).sum().backward()
    model[0].running_mean.fill_(torch.nan)  # what was there has no weight
    before = copy.deepcopy(model)
    grads = [p.grad.clone() for p in model.parameters()]
    recompute_statistics(model, [samples()])
    assert_statistics(model[0], population(to_rows(samples())))
    for (name, now), then in zip(model.state_dict().items(), before.state_dict().values(), strict=True):
        assert torch.equal(now, then) != name.endswith(KEYS[:2]), name
    assert same_bits([p.grad for p in model.parameters()], grads)
    for now, then in zip(model.modules(), before.modules(), strict=True):
        assert now.training == then.training
        assert not now._forward_pre_hooks
        assert getattr(now, "momentum", 0) == getattr(then, "momentum", 0)


def test_which_layers_take_part():
    layers = nn.ModuleDict({name: SyncBatchNorm(3) for name in ("used", "twice", "frozen", "unused", "off")})
    layers["untracked"] = nn.BatchNorm1d(3, track_running_stats=False)
    layers["instance"] = nn.InstanceNorm1d(3, track_running_stats=True)
    layers["frozen"].eval()
    layers["off"].track_running_stats = False
    before = copy.deepcopy(layers).state_dict()
    x, other = samples().float(), samples(5, mean=7.0).float()

    def forward(batch):
        assert not torch.is_grad_enabled()
        for name in ("used", "twice", "frozen", "off", "untracked"):
            layers[name](batch["x"])
        layers["twice"](input=batch["other"])

    recompute_statistics(layers, [{"x": x, "other": other}], forward=forward)
    assert_statistics(layers["used"], population(to_rows(x).double()))
    assert_statistics(layers["twice"], population(torch.cat([to_rows(x), to_rows(other)]).double()))
    changed = {name for name, tensor in layers.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed == {f"{name}.{key}" for name in ("used", "twice") for key in KEYS[:2]}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_sums_are_float64_in_any_dtype(dtype):
    x = samples(mean=100.0).to(dtype)
    layer = SyncBatchNorm(3, dtype=dtype)
    recompute_statistics(layer, x.split(5))
    for key, value in zip(KEYS, population(to_rows(x).double()), strict=False):
        torch.testing.assert_close(getattr(layer, key), value.to(dtype))


def test_recompute_collectives():
    def replica(comm):
        recording = Recording(comm)
        recompute_statistics(network(), [samples()] * 3, process_group=recording)
        return [numbers for numbers, _ in recording.calls]

    assert run_threads(2, replica) == [[6, 2, 2, 2, 2, 7 + 11]] * 2


def test_a_model_without_norm_layers_is_left_alone():
    recompute_statistics(nn.Conv1d(3, 2, 1).double(), [samples()])


ERRORS = {
    "eval": (InputError, "eval mode.*train()", lambda model, rank: (model.eval(), [samples()])),
    "one in eval": (InputError, "rank 0 has '0: not.*training.*rank 1 has", lambda m, r: (m.train(r == 0), [])),
    "no batches": (InputError, "no batch norm layer was run", lambda model, rank: (model, [])),
    "channels": (InputError, "running_mean of shape", lambda model, rank: (model, [samples(channels=2)])),
    "integers": (DTypeError, "floating-point input", lambda model, rank: (model, [torch.ones(2, 3, 4).int()])),
    "other models": (InputError, r"0.running_mean.*\(3,\)", lambda m, r: (m if r == 0 else m[2:], [])),
    "other kinds": (InputError, "not synchronised.*", lambda m, r: (m if r == 0 else convert_sync_batchnorm(m), [])),
}


@pytest.mark.parametrize("case", ERRORS)
def test_an_error_is_on_every_rank_and_changes_nothing(case):
    error, message, arrange = ERRORS[case]

    def replica(comm):
        model, batches = arrange(network(), comm.rank)
        before = statistics(model)
        with pytest.raises(error, match=message):
            recompute_statistics(model, batches, process_group=comm)
        assert same_bits(statistics(model), before)
        assert not any(m._forward_pre_hooks for m in model.modules())

    run_threads(2, replica)


@pytest.mark.parametrize("convert", [True, False])
def test_unequal_numbers_of_batches_are_seen_before_a_forward_waits(convert):
    def replica(comm):
        model = network(comm=comm, convert=convert)
        before = statistics(model)
        with pytest.raises(InputError, match="got 2 on rank 1, 2 and more on the others"):
            recompute_statistics(model, [samples()] * (4 if comm.rank == 0 else 2), process_group=comm)
        assert same_bits(statistics(model), before)

    run_threads(3, replica)


def test_a_forward_that_fails_changes_nothing():
    model = network()
    before = statistics(model)

    def forward(batch):
        model(batch)
        raise KeyError

    with pytest.raises(KeyError):
        recompute_statistics(model, [samples()], forward=forward)
    assert same_bits(statistics(model), before)
    assert not any(m._forward_pre_hooks for m in model.modules())


def test_compiled_models_run_as_written():
    model = network(convert=True)
    compiled = torch.compile(model, backend="eager")
    compiled(samples(4))
    recompute_statistics(compiled, [samples()])
    assert_statistics(model[0], population(to_rows(samples())))
    layers = nn.Sequential(network(), nn.ReLU())
    layers[0].compile(backend="eager")
    layers(samples(4))
    recompute_statistics(layers, [samples()])
    assert_statistics(layers[0][0], population(to_rows(samples())))


def _wrapped(rank, size):
    plain, synchronised = network(), network(convert=True)
    outcomes = []
    for model, options in ((plain, {}), (synchronised, {"broadcast_buffers": False})):
        wrapped = DistributedDataParallel(model, **options)
        wrapped(samples()[rank::size]).sum().backward()
        if model is synchronised and rank == 0:
            wrapped = torch.compile(wrapped, backend="eager")
        recompute_statistics(wrapped, [samples(12)[rank::size], samples()[rank::size]])
        assert_in_sync(wrapped)
        outcomes.append(statistics(model))
    return outcomes


def test_models_in_ddp_over_gloo(gloo):
    """Also with DDP's broadcasts, and on one rank compiled."""
    expected = population(torch.cat([to_rows(samples(12)), to_rows(samples())]))
    for outcome in gloo(2, _wrapped):
        for actual in outcome:
            assert_tensor_close(actual[0], expected[0])
            assert_tensor_close(actual[1], expected[1])


# synchronize_statistics


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_ranks_statistics_are_combined_by_the_law_of_total_variance(ranks):
    parts = [to_rows(x) for x in samples().chunk(ranks)]

    def replica(comm):
        model = nn.Sequential(nn.BatchNorm1d(3), SyncBatchNorm(3, process_group=Unreachable())).double().eval()
        for layer in model:
            layer.running_mean.copy_(parts[comm.rank].mean(0))
            layer.running_var.copy_(parts[comm.rank].var(0, correction=0))
            layer.num_batches_tracked.fill_(10 + min(comm.rank, 1))
        synchronize_statistics(model, process_group=comm)
        assert_in_sync(model, process_group=comm)
        return model

    whole = torch.cat(parts)
    for model in run_threads(ranks, replica):
        for layer in model:
            tracked = torch.tensor({1: 10, 2: 10, 3: 11, 4: 11}[ranks])
            assert_statistics(layer, [whole.mean(0), whole.var(0, correction=0), tracked])


def test_equal_statistics_stay():
    layer = nn.BatchNorm1d(3)
    layer(samples().float())

    def replica(comm):
        mine = copy.deepcopy(layer)
        synchronize_statistics(mine, process_group=comm)
        return list(mine.buffers())

    assert all(same_bits(buffers, layer.buffers()) for buffers in run_threads(3, replica))


def test_synchronize_collectives():
    def replica(comm):
        recording = Recording(comm)
        synchronize_statistics(network(), process_group=recording)
        return [numbers for numbers, _ in recording.calls]

    assert run_threads(2, replica) == [[6, 8 + 12]] * 2


def test_a_layer_without_a_count():
    layer = nn.BatchNorm1d(3)
    layer.num_batches_tracked = None
    synchronize_statistics(layer)
    assert_in_sync(layer)


@pytest.mark.parametrize("function", [synchronize_statistics, assert_in_sync])
def test_other_layers_are_the_same_error_on_every_rank(function):
    def replica(comm):
        model = nn.Sequential(nn.BatchNorm1d(3 + comm.rank))
        before = statistics(model)
        with pytest.raises(InputError) as error:
            function(model, process_group=comm)
        assert same_bits(statistics(model), before)
        return str(error.value)

    first, second = run_threads(2, replica)
    assert first == second
    assert "batch norm layers differ: rank 0 has '0.running_mean: torch.float32 (3,)" in first


@pytest.mark.parametrize("function", [synchronize_statistics, assert_in_sync, lambda m: recompute_statistics(m, [])])
def test_statistics_without_values_are_refused(function):
    with pytest.raises(DTypeError, match="running_mean is on the meta device"):
        function(nn.BatchNorm1d(3, device="meta"))


# assert_in_sync


def test_in_sync_takes_one_collective():
    def replica(comm):
        model = network(comm=comm, convert=True)
        model(samples()[comm.rank :: comm.size])
        model[0].running_mean[0] = torch.nan  # the same everywhere
        recording = Recording(comm)
        assert_in_sync(model, process_group=recording)
        return recording.calls

    assert run_threads(3, replica) == [[(9, torch.float64)]] * 3


def test_what_is_not_in_sync_is_a_table_on_every_rank():
    def replica(comm):
        model = nn.Sequential(nn.BatchNorm1d(2), nn.BatchNorm1d(2).bfloat16())
        if comm.rank in (1, 3):
            model[0].running_mean[1] = 0.25 * comm.rank
            model[1].num_batches_tracked += 2
        if comm.rank == 2:
            model[1].running_mean[0] = -0.0
        before = statistics(model)
        with pytest.raises(InputError) as error:
            assert_in_sync(model, process_group=comm)
        assert same_bits(statistics(model), before)
        return str(error.value)

    expected = (
        "running statistics differ between ranks\n"
        "layer and buffer: ranks unlike rank 0, largest difference\n"
        "0.running_mean: 1, 3, 0.75\n"
        "1.running_mean: 2, 0\n"
        "1.num_batches_tracked: 1, 3, 2"
    )
    assert run_threads(4, replica) == [expected] * 4


def _local_training(rank, size):
    model = DistributedDataParallel(network(), broadcast_buffers=False)
    model(samples()[rank::size])
    with pytest.raises(InputError, match=r"module.0.running_mean: 1, "):
        assert_in_sync(model)
    synchronize_statistics(model)
    assert_in_sync(model)


def test_local_statistics_over_gloo(gloo):
    gloo(2, _local_training)

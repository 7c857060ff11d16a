"""broadcast_parameters, average_gradients, global_mean: data-parallel training through one verb."""

import sys

import pytest
import torch
from reference import SIGNATURE, Recording, Unreachable, random_batch
from torch import nn
from torch.utils._pytree import tree_map

import syncbn
from syncbn import SyncBatchNorm, average_gradients, broadcast_parameters, convert_sync_batchnorm, global_mean
from syncbn._buckets import _pieces
from syncbn.comm import SingleProcess, run_threads
from syncbn.errors import DTypeError, InputError


class Everything(nn.Module):
    """Parameters and buffers of every dtype and shape, some of them tied or empty."""

    def __init__(self, fill):
        super().__init__()
        for dtype in (torch.float32, torch.float64, torch.float16, torch.bfloat16):
            self.register_parameter(
                f"of_{dtype}".replace("torch.", ""), nn.Parameter(torch.full((2, 3), fill, dtype=dtype))
            )
        self.tied = self.of_float32
        self.register_buffer("scalar", torch.tensor(fill))
        self.register_buffer("integers", torch.full((4,), int(fill)))
        self.register_buffer("mask", torch.tensor([fill > 0, True]))
        self.register_buffer("hidden", torch.full((2,), fill), persistent=False)
        self.register_buffer("empty", torch.empty(0))
        self.frozen = nn.Parameter(torch.full((3, 2), fill).t(), requires_grad=False)  # not contiguous


def all_tensors(module):
    return [*module.parameters(), *module.buffers()]


# broadcast_parameters


@pytest.mark.parametrize("world", [1, 2, 4])
def test_broadcast_gives_everybody_what_rank_0_has(world):
    def replica(comm):
        module = Everything(-float(comm.rank) or 1.5)
        before = list(map(id, all_tensors(module)))
        broadcast_parameters(module, process_group=comm)
        assert list(map(id, all_tensors(module))) == before
        assert module.tied is module.of_float32
        return all_tensors(module)

    expected = all_tensors(Everything(1.5))
    for tensors in run_threads(world, replica):
        assert all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(tensors, expected, strict=True))


BITS = {
    torch.int64: [2**53 + 1, -(2**63), 2**63 - 1],
    torch.int32: [-(2**31), 2**31 - 1, -1],
    torch.int16: [-(2**15), 2**15 - 1, -1],
    torch.int8: [-128, 127, -1],
    torch.uint8: [0, 255, 128],
    torch.uint64: [2**64 - 1, 2**63, 1],
    torch.bool: [True, False, True],
    torch.float64: [-0.0, 5e-324, float("nan")],
    torch.float32: [-0.0, 1e-45, float("nan")],
    torch.float16: [-0.0, 6e-8, float("nan")],
    torch.bfloat16: [-0.0, 1e-40, float("nan")],
    torch.float8_e4m3fn: [-0.0, 2.0**-9, float("nan")],
    torch.complex64: [complex(-0.0, float("nan")), complex(float("inf"), -0.0), 1j],
    torch.complex128: [complex(-0.0, float("nan")), complex(float("inf"), -0.0), 1j],
}
INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def bits(tensor):
    """The tensor's memory, in the order of its elements: what == cannot tell of NaN and -0.0."""
    return (
        tensor.detach()
        .resolve_conj()
        .resolve_neg()
        .clone(memory_format=torch.contiguous_format)
        .reshape(-1)
        .view(torch.uint8)
        .tolist()
    )


def with_payloads(dtype, values):
    """The values and, for floating dtypes, NaNs that carry a payload: a signalling and a negative one."""
    tensor = torch.tensor(values, dtype=dtype)
    if not dtype.is_floating_point or dtype.itemsize < 2:
        return tensor
    exponent = torch.tensor(float("inf"), dtype=dtype).view(INTEGERS[dtype.itemsize]).item()
    smallest = -(2 ** (8 * dtype.itemsize - 1))
    integers = torch.tensor([exponent + 5, smallest + exponent + 7], dtype=INTEGERS[dtype.itemsize])
    return torch.cat([tensor, integers.view(dtype)])


class Holder(nn.Module):
    """Buffers and a parameter that are given."""

    def __init__(self, parameter=None, **buffers):
        super().__init__()
        for name, tensor in buffers.items():
            self.register_buffer(name, tensor)
        if parameter is not None:
            self.parameter = parameter


@pytest.mark.parametrize("dtype", BITS, ids=str)
@pytest.mark.parametrize("odd", [False, True], ids=["contiguous", "strided"])
def test_broadcast_delivers_the_bits_and_does_not_write_on_rank_0(dtype, odd):
    values = with_payloads(dtype, BITS[dtype])

    def replica(comm):
        column = torch.zeros(len(values), 2, dtype=dtype)[:, 0] if odd else torch.zeros(len(values), dtype=dtype)
        if comm.rank == 0:
            column.copy_(values)
        module = Holder(one=column, another=column[:2].clone())
        versions = [buffer._version for buffer in module.buffers()]
        broadcast_parameters(module, process_group=comm)
        written = [buffer._version for buffer in module.buffers()] != versions
        return bits(module.one), bits(module.another), written

    expected = bits(values), bits(values[:2])
    assert run_threads(3, replica) == [(*expected, rank > 0) for rank in range(3)]


ODD = {
    "transposed": lambda x: x.t(),
    "channels_last": lambda x: x.view(1, 2, 3, 2).to(memory_format=torch.channels_last),
    "expanded": lambda x: x[:1].expand(5, 4),
    "expanded inside": lambda x: x[:, :, None].expand(3, 4, 2).transpose(0, 2),
    "sliced": lambda x: x[::2, 1::2],
    "conjugate": lambda x: torch.complex(x, x + 1).conj(),
    "negative": lambda x: torch.complex(x, x + 1).conj().imag,
    "scalar": lambda x: x[0, 0],
    "empty": lambda x: x[:0],
}


@pytest.mark.parametrize("make", ODD.values(), ids=ODD)
def test_broadcast_into_any_layout(make):
    ones = [torch.arange(12.0).view(3, 4) * (-1) ** rank + rank for rank in range(2)]

    def replica(comm):
        alone = Holder(nn.Parameter(make(ones[comm.rank].clone())))
        twins = Holder(a=make(ones[comm.rank].clone()), b=make(ones[comm.rank].clone()))
        strides = alone.parameter.stride()
        for module in (alone, twins):
            broadcast_parameters(module, process_group=comm)
        assert alone.parameter.stride() == strides
        return bits(alone.parameter), bits(twins.a), bits(twins.b)

    expected = bits(make(ones[0]))
    assert run_threads(2, replica) == [(expected,) * 3] * 2


def test_layouts_may_differ_between_replicas():
    values = torch.arange(24.0).view(1, 2, 3, 4)
    formats = [torch.contiguous_format, torch.channels_last]

    def replica(comm):
        module = Holder(nn.Parameter((values - 9 * comm.rank).to(memory_format=formats[comm.rank])))
        module.parameter.grad = (values - comm.rank).to(memory_format=formats[1 - comm.rank])
        broadcast_parameters(module, process_group=comm)
        average_gradients(module, process_group=comm)
        return torch.equal(module.parameter, values) and torch.equal(module.parameter.grad, values - 0.5)

    assert run_threads(2, replica) == [True, True]


def test_an_expanded_tensor_cannot_take_values_that_differ():
    def replica(comm):
        module = Holder(x=torch.zeros(3) if comm.rank == 0 else torch.zeros(1).expand(3))
        with pytest.raises(InputError, match=r"'x: torch.float32 \(3,\) expanded from \(1,\) on cpu'"):
            broadcast_parameters(module, process_group=comm)

    run_threads(2, replica)


def test_broadcast_keeps_leaves_that_require_grad():
    def replica(comm):
        layer = nn.Linear(2, 2)
        broadcast_parameters(layer, process_group=comm)
        layer(torch.ones(1, 2)).sum().backward()
        return layer.weight.is_leaf and layer.weight.requires_grad

    assert all(run_threads(2, replica))


class InOrder(nn.Module):
    """Layers of equal shapes, registered as `names` says."""

    def __init__(self, names):
        super().__init__()
        for name in names:
            self.add_module(name, nn.Linear(2, 2))


def frozen(layer, *names):
    for name in names:
        getattr(layer, name).requires_grad = False
    return layer


DIFFERENT = {  # what rank 1 has that is different, and how it is called
    "shape": (lambda rank: nn.Linear(2, 2 + rank), "weight: torch.float32 (2, 2)", "weight: torch.float32 (3, 2)"),
    "number": (lambda rank: nn.Linear(2, 2, bias=not rank), "bias: torch.float32 (2,)", "no more"),
    "dtype": (
        lambda rank: nn.Linear(2, 2, dtype=[torch.float32, torch.float64][rank]),
        "weight: torch.float32 (2, 2)",
        "weight: torch.float64 (2, 2)",
    ),
    "none": (lambda rank: nn.ReLU() if rank else nn.Linear(2, 2), "weight: torch.float32 (2, 2)", "no more"),
    "order": (lambda rank: InOrder(["ab", "ba"][rank]), "a.weight: torch.float32", "b.weight: torch.float32"),
    "name": (lambda rank: InOrder(["a", "c"][rank]), "a.weight: torch.float32", "c.weight: torch.float32"),
    "requires_grad": (
        lambda rank: frozen(nn.Linear(2, 2), *["bias"] * rank),
        "bias: torch.float32 (2,) on cpu, requires grad'",
        "bias: torch.float32 (2,) on cpu'",
    ),
}


@pytest.mark.parametrize("function", [broadcast_parameters, average_gradients])
@pytest.mark.parametrize("case", DIFFERENT)
def test_different_models_are_the_same_error_on_every_replica(case, function):
    make, on_0, on_1 = DIFFERENT[case]

    def replica(comm):
        recording = Recording(comm)
        module = make(min(comm.rank, 1))
        for p in module.parameters():
            p.grad = torch.full_like(p, comm.rank)
        before = [t.detach().clone() for p in module.parameters() for t in (p, p.grad)]
        with pytest.raises(InputError, match="same model, in the same order, on every rank") as caught:
            function(module, process_group=recording)
        after = [t for p in module.parameters() for t in (p, p.grad)]
        assert all(map(torch.equal, before, after))
        assert [dtype for _, dtype in recording.calls] == [torch.float64] * 2
        assert recording.calls[0] == (9, torch.float64)
        return str(caught.value)

    first, second, third = run_threads(3, replica, timeout=5)
    assert first == second == third
    assert f"rank 0 has '{on_0}" in first
    assert f"rank 1 has '{on_1}" in first
    assert ("(they have the same, in another order)" in first) == (case == "order")


@pytest.mark.parametrize("function", [broadcast_parameters, average_gradients])
def test_the_rank_that_differs_is_named(function):
    def replica(comm):
        with pytest.raises(InputError, match=r"rank 0 has 'weight: .*\(2, 2\).* where rank 2 has 'weight: .*\(5, 2\)"):
            function(nn.Linear(2, 5 if comm.rank == 2 else 2), process_group=comm)

    run_threads(4, replica)


@pytest.mark.parametrize("function", [broadcast_parameters, average_gradients])
def test_tied_on_one_replica(function):
    def replica(comm):
        first = nn.Linear(2, 2)
        module = nn.ModuleDict({"a": first, "b": first if comm.rank else nn.Linear(2, 2)})
        with pytest.raises(InputError, match=r"rank 0 has 'b\.weight: .*rank 1 has 'no more'"):
            function(module, process_group=comm)

    run_threads(2, replica)


def test_a_replica_may_be_compiled():
    """torch.compile puts a module around the model, which changes every name."""

    def replica(comm):
        model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
        module = nn.ModuleDict({"_orig_mod": model}) if comm.rank else model  # as torch.compile(model)
        broadcast_parameters(module, process_group=comm)
        return [p.sum().item() for p in module.parameters()]

    first, second = run_threads(2, replica)
    assert first == second


class Subclass(torch.Tensor):
    pass


def on_meta():
    return nn.Parameter(torch.empty(2, 2, device="meta"))


def in_inference_mode():
    with torch.inference_mode():
        return torch.zeros(2)


def quantised():
    return torch._empty_affine_quantized([2], scale=1.0, zero_point=0, dtype=torch.quint8)


UNFIT = {
    "subclass": (lambda: torch.zeros(2).as_subclass(Subclass), "a Subclass; a subclass of torch.Tensor"),
    "sparse": (lambda: torch.eye(2).to_sparse(), "a torch.sparse_coo tensor: use a dense one"),
    "compressed": (lambda: torch.eye(2).to_sparse_csr(), "a torch.sparse_csr tensor: use a dense one"),
    "quantised": (quantised, r"a quantised tensor \(torch.quint8\)"),
    "meta": (on_meta, r"on the meta device, without values: call module\.to_empty"),
    "inference": (in_inference_mode, "made in inference_mode"),
    "lazy": (nn.UninitializedParameter, "a UninitializedParameter; it has no shape yet: run one forward first"),
    "nested": (lambda: torch.nested.nested_tensor([torch.zeros(2), torch.zeros(3)]), "a nested tensor"),
}


@pytest.mark.filterwarnings("ignore:.*(prototype|beta|deprecated).*")
@pytest.mark.parametrize("alone", [False, True], ids=["everywhere", "on rank 1"])
@pytest.mark.parametrize("case", UNFIT)
def test_what_is_not_plain_memory_is_refused_by_name_on_every_replica(case, alone):
    make, problem = UNFIT[case]

    def replica(comm):
        tensor = make() if comm.rank or not alone else torch.zeros(2)
        module = nn.ModuleDict({"first": nn.Linear(2, 2), "second": Holder()})
        module["second"].register_buffer("odd", tensor)
        before = module["first"].weight.detach().clone()
        with pytest.raises((DTypeError, InputError), match=rf"second\.odd(: | is ){problem}") as caught:
            broadcast_parameters(module, process_group=comm)
        assert torch.equal(module["first"].weight, before)
        return type(caught.value), str(caught.value)

    (kind, message), *others = run_threads(3, replica, timeout=5)
    assert others == [(kind, message)] * 2
    assert kind is (InputError if alone else DTypeError)


@pytest.mark.parametrize("function", [broadcast_parameters, average_gradients])
@pytest.mark.parametrize("on", [(0, 1), (1,)], ids=["everywhere", "on rank 1"])
def test_a_model_without_values_is_refused(function, on):
    """As other ranks than 0 have it with deferred initialisation."""

    def replica(comm):
        layer = nn.Linear(2, 2, device="meta" if comm.rank in on else "cpu")
        with pytest.raises((DTypeError, InputError), match=r"weight(: | is )on the meta device"):
            function(layer, process_group=comm)

    run_threads(2, replica)


def _sharded(rank, size):
    from torch.distributed.fsdp import fully_shard

    net = nn.Sequential(nn.Linear(2, 4), nn.ReLU(), nn.Linear(4, 2))
    fully_shard(net, mesh=torch.distributed.device_mesh.init_device_mesh("cpu", (size,)))
    net(torch.randn(3, 2)).sum().backward()
    remedy = r"0\.weight is a DTensor; FSDP2 averages gradients itself.*call broadcast_parameters before fully_shard"
    for function in (broadcast_parameters, average_gradients):
        with pytest.raises(DTypeError, match=remedy):
            function(net)
    with pytest.raises(DTypeError, match="floating-point total, got a DTensor"):
        global_mean(next(net.parameters()).sum(), 3)
    if rank == 0:  # on one rank alone
        net = nn.Sequential(nn.Linear(2, 4), nn.ReLU(), nn.Linear(4, 2))
    with pytest.raises(InputError, match=r"rank 1 has '0\.weight: a DTensor; FSDP2"):
        average_gradients(net)


def test_fsdp2_is_refused_with_the_remedy(gloo):
    gloo(2, _sharded)


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(*[nn.Linear(4, 1) for _ in range(3)])
        self.double_one = nn.Linear(1, 1).double()
        self.large = nn.Parameter(torch.randn(3, 1, 5))


def test_large_models_go_in_pieces(monkeypatch):
    """8 numbers of float32 or 4 of float64 at least in one collective, but for the last of each dtype."""
    monkeypatch.setattr(syncbn._parallel, "BUCKET_BYTES", 64)

    def replica(comm):
        recording = Recording(comm)
        model = Model()
        broadcast_parameters(model, process_group=recording)
        return [p.sum().item() for p in model.parameters()], recording.calls

    (first, calls), (second, _) = run_threads(2, replica)
    assert first == second
    assert {dtype for _, dtype in calls} == {torch.float64}
    check, *lengths = [length for length, _ in calls]
    assert check == 3 * 2
    assert lengths == [12, 12, 12, 4, 8]  # up to multiples of four: 10, 9, 10, 1 numbers, and 2 doubles


def test_large_gradients_go_in_pieces(monkeypatch):
    monkeypatch.setattr(syncbn._parallel, "BUCKET_BYTES", 4 * 6)

    def replica(comm):
        recording = Recording(comm)
        model = Model()
        for number, p in enumerate(model.parameters()):
            p.grad = torch.full_like(p, number + 2.0 * comm.rank)
        average_gradients(model, process_group=recording)
        assert all(torch.all(p.grad == number + 1) for number, p in enumerate(model.parameters()))
        return recording.calls

    calls, others = run_threads(2, replica)
    assert calls == others
    assert calls[0] == (6, torch.float64)
    assert sum(length for length, dtype in calls if dtype == torch.float32) == 30
    assert all(6 <= length < 12 for length, dtype in calls[1:-2] if dtype == torch.float32)
    assert calls[-1] == (2, torch.float64)
    assert len(calls) <= 1 + 30 // 6 + 1 + 1


def test_a_large_tensor_is_cut_along_its_first_dimensions():
    assert [len(piece) for piece in _pieces(torch.empty(10, 3), 7)] == [2] * 5
    assert [tuple(piece.shape) for piece in _pieces(torch.empty(2, 10), 4)] == [(4,), (4,), (2,)] * 2


def test_the_sizes_that_the_docstrings_name():
    """25 MB a collective: 12.5 MB of tensors in broadcast, 25 MB in average."""

    def replica(comm):
        model = nn.ParameterList([nn.Parameter(torch.zeros(1000, 1000)) for _ in range(10)])
        lengths = []
        for function in (broadcast_parameters, average_gradients):
            recording = Recording(comm)
            for p in model:
                p.grad = torch.zeros_like(p)
            function(model, process_group=recording)
            lengths.append([length for length, _ in recording.calls])
        return lengths

    assert run_threads(2, replica)[0] == [[6, 4_000_000, 4_000_000, 2_000_000], [6, 7_000_000, 3_000_000]]


# average_gradients


def test_average_is_the_mean():
    gradients = torch.randn(3, 2, 2)

    def replica(comm):
        layer = nn.Linear(2, 2, bias=False)
        layer.weight.grad = gradients[comm.rank].clone()
        average_gradients(layer, process_group=comm)
        return layer.weight.grad

    for grad in run_threads(3, replica):
        torch.testing.assert_close(grad, gradients.mean(0))


def test_gradients_that_only_some_replicas_have():
    def replica(comm):
        module = nn.ParameterDict({name: nn.Parameter(torch.ones(2)) for name in ("all", "first", "none", "frozen")})
        module["frozen"].requires_grad = False
        module["all"].grad = torch.full((2,), 3.0 * comm.rank)
        if comm.rank == 0:
            module["first"].grad = torch.full((2,), 6.0)
        average_gradients(module, process_group=comm)
        return {name: p.grad if p.grad is None else p.grad[0].item() for name, p in module.items()}

    assert run_threads(3, replica) == [{"all": 3.0, "first": 2.0, "none": None, "frozen": None}] * 3


def test_gradients_are_averaged_in_place_in_few_collectives():
    """One for the check, a second only where not all have the same; half goes with float32."""

    def replica(comm):
        recording = Recording(comm)
        module = nn.ParameterList([nn.Parameter(torch.ones(3, dtype=dtype)) for dtype in FLOATS_AND_COMPLEX])
        seen = []
        for missing in (False, True):
            for p in module:
                p.grad = torch.full_like(p, 2 * comm.rank)
            if missing and comm.rank:
                module[0].grad = None
            before = [p.grad for p in module]
            recording.calls = []
            average_gradients(module, process_group=recording)
            assert all(p.grad is old or old is None for p, old in zip(module, before, strict=True))
            seen.append(recording.calls)
        assert [p.grad.tolist() for p in module] == [[0] * 3, *[[1] * 3] * 5]
        return seen

    check = (6, torch.float64)
    data = [(9, torch.float32), (3, torch.float64), (6, torch.float32), (6, torch.float64)]
    assert run_threads(2, replica) == [[[check, *data], [check, (6, torch.float32), *data]]] * 2


FLOATS_AND_COMPLEX = [
    torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.complex64, torch.complex128
]  # fmt: skip


ODD_GRADIENTS = {
    "expanded": lambda x: x[0, 0].expand(3, 4),
    "transposed": lambda x: x.t().contiguous().t(),
    "requires grad": lambda x: x.clone().requires_grad_() * 1,
    "conjugate": lambda x: torch.complex(x, x + 1).conj(),
    "negative": lambda x: torch.complex(x, x + 1).conj().imag,
}


@pytest.mark.parametrize("both", [True, False], ids=["both", "rank 1"])
@pytest.mark.parametrize("make", ODD_GRADIENTS.values(), ids=ODD_GRADIENTS)
def test_gradients_of_any_layout(make, both):
    x = torch.randn(2, 3, 4)
    given = [make(part).detach().resolve_conj().resolve_neg().clone() for part in x]

    def replica(comm):
        layer = Holder(nn.Parameter(torch.zeros_like(given[0])))
        layer.parameter.grad = make(x[comm.rank]) if comm.rank or both else given[0].clone()
        average_gradients(layer, process_group=comm)
        return layer.parameter.grad

    for grad in run_threads(2, replica):
        torch.testing.assert_close(grad.detach().resolve_conj().resolve_neg(), torch.stack(given).mean(0))


def calls_of(function, *args):
    """Python and C functions that `function` calls: a measure of its work that does not depend on the machine."""
    count = 0

    def profile(frame, event, arg):
        nonlocal count
        count += event in ("call", "c_call")

    sys.setprofile(profile)
    try:
        function(*args)
    finally:
        sys.setprofile(None)
    return count


class Twin:
    """Rank 0 of 2; the other sends the same. No threads, so that calls can be counted."""

    rank, size = 0, 2

    def all_reduce(self, x):
        if x.numel() == 6 + SIGNATURE:  # the check
            return torch.cat([x[:3], x[:3], 2 * x[6:]])
        return 2 * x


@pytest.mark.parametrize(("function", "most"), [(broadcast_parameters, 40), (average_gradients, 60)])
def test_work_is_linear_in_the_number_of_tensors(function, most):
    """It was quadratic: 8 000 tensors took seconds a step."""

    def work(number):
        module = nn.ParameterList([nn.Parameter(torch.zeros(2)) for _ in range(number)])
        for p in module:
            p.grad = torch.ones_like(p)
        return calls_of(lambda: function(module, process_group=Twin()))

    few, more, many = work(100), work(200), work(1000)
    assert (more - few) / 100 < most
    assert (many - few) / 900 == pytest.approx((more - few) / 100, rel=0.05)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_gradients_are_summed_in_float32(dtype):
    """3e4 + 3e4 + 3e4 is infinite in half; 256 + 1 + 1 is 256 in bfloat16."""
    values = {torch.float16: [3e4, 3e4, 3e4], torch.bfloat16: [256, 1, 1]}[dtype]

    def replica(comm):
        layer = nn.Linear(1, 1, bias=False, dtype=dtype)
        layer.weight.grad = torch.full((1, 1), values[comm.rank], dtype=dtype)
        average_gradients(layer, process_group=comm)
        return layer.weight.grad

    for grad in run_threads(3, replica):
        assert grad.dtype == dtype
        assert torch.equal(grad, torch.full((1, 1), sum(values) / 3, dtype=dtype))


@pytest.mark.parametrize(
    ("sparse_on", "error"),
    [
        ((0, 1), "weight.grad is a torch.sparse_coo tensor"),
        ((1,), "rank 0 has 'no more' where rank 1 has 'weight.grad: a torch.sparse_coo tensor: use a dense one'"),
    ],
)
def test_sparse_gradients_are_refused_by_every_replica(sparse_on, error):
    def replica(comm):
        layer = nn.Embedding(3, 2, sparse=comm.rank in sparse_on)
        layer(torch.tensor([1])).sum().backward()
        with pytest.raises((DTypeError, InputError), match=error):
            average_gradients(layer, process_group=comm)

    run_threads(2, replica)


@pytest.mark.parametrize("other", ["meta"])
def test_the_default_device_is_another(other):
    """Every tensor made here says where; the threads have a default device each."""

    def replica(comm):
        model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2, bias=False))
        for p in list(model.parameters())[comm.rank :]:
            p.grad = torch.full_like(p, comm.rank)
        with torch.device(other):
            broadcast_parameters(model, process_group=comm)
            average_gradients(model, process_group=comm)
            mean = global_mean(model[0].weight.sum(), 2, process_group=comm)
            mean.backward()
            with pytest.raises(InputError, match="differ"):
                broadcast_parameters(nn.Linear(2, 2, device="cpu", bias=bool(comm.rank)), process_group=comm)
        return tree_map(lambda p: (bits(p), bits(p.grad)), list(model.parameters())), mean.item()

    first, second = run_threads(2, replica)
    assert first == second


@pytest.mark.parametrize("function", [broadcast_parameters, average_gradients])
def test_a_world_of_one_changes_nothing(function):
    layer = nn.Linear(2, 2)
    layer(torch.ones(1, 2)).sum().backward()
    before = [p.detach().clone() for p in layer.parameters()], [p.grad.clone() for p in layer.parameters()]
    function(layer)
    assert all(map(torch.equal, layer.parameters(), before[0]))
    assert all(torch.equal(p.grad, grad) for p, grad in zip(layer.parameters(), before[1], strict=True))


# global_mean


def test_global_mean_is_the_mean_of_all_terms_with_its_gradient():
    """Averaged over the replicas, the gradient is that of the whole batch's loss, whoever holds how many terms."""
    parts = [torch.randn(n, dtype=torch.float64) for n in (5, 0, 2)]
    weight = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
    whole = (torch.cat(parts) * weight).sin().mean()
    whole.backward()

    def replica(comm):
        mine = weight.detach().clone().requires_grad_()
        loss = global_mean((parts[comm.rank] * mine).sin().sum(), parts[comm.rank].numel(), process_group=comm)
        loss.backward()
        return loss.detach(), mine.grad

    losses, grads = zip(*run_threads(3, replica), strict=True)
    for loss in losses:
        torch.testing.assert_close(loss, whole.detach(), rtol=1e-12, atol=0)
    torch.testing.assert_close(sum(grads) / 3, weight.grad, rtol=1e-12, atol=0)


def test_the_mean_of_means_is_another_number():
    """Negative control of the test above."""
    parts = [torch.tensor([1.0, 1.0, 1.0]), torch.tensor([5.0])]
    assert torch.stack([part.mean() for part in parts]).mean() == 3
    assert run_threads(
        2, lambda comm: global_mean(parts[comm.rank].sum(), len(parts[comm.rank]), process_group=comm)
    ) == [2, 2]


@pytest.mark.parametrize(
    "totals", [torch.rand(3, 100) * 7, torch.tensor([[3e8], [-3e8 + 32], [0.0]])], ids=["bits", "far"]
)
def test_global_mean_is_the_same_on_every_replica(totals):
    results = run_threads(3, lambda comm: global_mean(totals[comm.rank], 2, process_group=comm))
    assert all(torch.equal(result, results[0]) for result in results)
    torch.testing.assert_close(results[0], (totals.double().sum(0) / 6).float())


def test_global_mean_of_nothing_is_zero():
    def replica(comm):
        x = torch.randn(3, requires_grad=True)
        loss = global_mean(x[:0].sum(), 0, process_group=comm)
        loss.backward()
        return loss.item(), x.grad.any().item()

    assert run_threads(2, replica) == [(0.0, False)] * 2


@pytest.mark.parametrize("count", [4, 4.0, torch.tensor(4), torch.tensor([4.0]), torch.tensor(4.0, requires_grad=True)])
def test_counts_of_any_kind(count):
    assert global_mean(torch.tensor(6.0), count, process_group=SingleProcess()) == 1.5


def test_global_mean_is_elementwise_and_keeps_shape_and_dtype():
    def replica(comm):
        total = torch.full((2, 1), float(comm.rank), dtype=torch.bfloat16, requires_grad=True)
        mean = global_mean(total, 1, process_group=comm)
        mean.sum().backward()
        return mean.shape, mean.dtype, mean[0, 0].item(), total.grad[0, 0].item()

    assert run_threads(2, replica) == [((2, 1), torch.bfloat16, 0.5, 1.0)] * 2


GREAT = [  # (totals, counts, dtype): one for each replica
    ([6e4, 3e4], [1, 1], torch.float16),  # the sum does not fit, the mean does
    ([6e4, 6e4], [0.5, 0.75], torch.float16),  # the mean is 96 000, infinite in half
    ([1e-7, 3e-7], [2**20, 2**20], torch.float16),  # P/Σcount is 0 in half
    ([6e4, 0.0], [1e-3, 2], torch.float16),
    ([3e38, 3e38], [1, 1], torch.float32),
    ([float("inf"), 1.0], [1, 1], torch.float32),
    ([1.0, float("nan")], [1, 1], torch.bfloat16),
    ([1.0, 1.0], [torch.tensor(2**24 + 1), torch.tensor(2)], torch.float32),
    ([1.0, 2.0], [torch.tensor(3.0, dtype=torch.float16), torch.tensor(65504.0, dtype=torch.float16)], torch.float16),
    ([1.0, 2.0], [torch.tensor(True), torch.tensor([False])], torch.bfloat16),
    ([1.0, 2.0], [2**53 - 1, 1], torch.float64),
]


@pytest.mark.parametrize(("totals", "counts", "dtype"), GREAT, ids=str)
def test_global_mean_of_great_and_small_numbers(totals, counts, dtype):
    totals = torch.tensor(totals, dtype=dtype)
    number = sum(map(float, counts))
    expected = (totals.double().sum() / number).to(dtype)
    slope = torch.tensor(3 * 2 / number, dtype=torch.float64).to(dtype)

    def replica(comm):
        total = totals[comm.rank].clone().requires_grad_()
        mean = global_mean(total, counts[comm.rank], process_group=comm)
        mean.backward(torch.full_like(mean, 3))
        return mean.detach(), total.grad

    for mean, grad in run_threads(2, replica):
        assert mean.dtype == grad.dtype == dtype
        torch.testing.assert_close(mean, expected, rtol=0, atol=0, equal_nan=True)
        torch.testing.assert_close(grad, slope, rtol=0, atol=0)


def test_global_mean_twice_differentiable():
    def replica(comm):
        x = torch.tensor([1.0, 2.0], dtype=torch.float64, requires_grad=True)
        loss = global_mean((x**3).sum(), 1 + 3 * comm.rank, process_group=comm)
        (slope,) = torch.autograd.grad(loss, x, create_graph=True)
        slope.sum().backward()
        return (x.grad * 5 / 2).tolist()

    assert run_threads(2, replica) == [pytest.approx([6.0, 12.0])] * 2


def test_a_count_that_is_nan_does_not_go_unseen():
    assert global_mean(torch.tensor(1.0), float("nan"), process_group=SingleProcess()).isnan()


@pytest.mark.parametrize("count", [torch.ones(2), torch.ones(0), [1, 2]], ids=str)
def test_a_count_is_one_number(count):
    with pytest.raises(InputError, match=r"expected one number as count, got shape \((2|0),\): pass count\.sum\(\)"):
        global_mean(torch.tensor(1.0), count, process_group=Unreachable())


def test_global_mean_of_integers_is_refused():
    with pytest.raises(DTypeError, match=r"floating-point total, got torch\.int64"):
        global_mean(torch.tensor(3), 1, process_group=Unreachable())


@pytest.mark.parametrize("grad", [True, False])
def test_global_mean_is_one_collective(grad):
    def replica(comm):
        recording = Recording(comm)
        with torch.set_grad_enabled(grad):
            loss = global_mean(torch.ones(2, requires_grad=True), 1, process_group=recording).sum()
            if grad:
                loss.backward()
        return recording.calls

    assert run_threads(2, replica) == [[(3, torch.float64)]] * 2


# All of it


def classifier():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(1), nn.Linear(16, 3)).double()


def train(model, parts, loss_of, reduce):
    """Five steps of SGD with momentum; return the losses and the state."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    losses = []
    for x, target in parts:
        optimizer.zero_grad()
        loss = loss_of(nn.functional.cross_entropy(model(x), target, reduction="sum"), len(x))
        loss.backward()
        reduce(model)
        optimizer.step()
        losses.append(loss.detach())
    return torch.stack(losses), model.state_dict()


@pytest.mark.parametrize("sizes", [[4, 4], [5, 1, 2], [3, 0, 4, 1]], ids=str)
def test_training_on_replicas_is_training_on_one(sizes):
    inputs = [random_batch([(sum(sizes), 2, 4, 4)], seed=seed).xs[0] for seed in range(5)]
    steps = [(x, torch.arange(len(x)) % 3) for x in inputs]
    whole_losses, whole_state = train(classifier(), steps, lambda total, n: total / n, lambda model: None)
    models = [classifier() for _ in sizes]  # not in the threads: the seed is global

    def replica(comm):
        model = convert_sync_batchnorm(models[comm.rank], process_group=comm)
        if comm.rank:
            nn.init.zeros_(model[0].weight)
        broadcast_parameters(model, process_group=comm)
        parts = [(x.split(sizes)[comm.rank], target.split(sizes)[comm.rank]) for x, target in steps]
        return train(
            model,
            parts,
            lambda total, n: global_mean(total, n, process_group=comm),
            lambda model: average_gradients(model, process_group=comm),
        )

    for losses, state in run_threads(len(sizes), replica):
        torch.testing.assert_close(losses, whole_losses, rtol=1e-10, atol=1e-10)
        for key, value in state.items():
            torch.testing.assert_close(value, whole_state[key], rtol=1e-10, atol=1e-10)


def test_training_with_local_statistics_is_not():
    """Negative control of the test above."""
    x = random_batch([(8, 2, 4, 4)]).xs[0]
    with pytest.raises(AssertionError):
        torch.testing.assert_close(classifier()(x)[:4], classifier()(x[:4]), rtol=1e-10, atol=1e-10)
    assert isinstance(convert_sync_batchnorm(classifier())[1], SyncBatchNorm)

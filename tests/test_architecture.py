"""Imports run one way; optional packages are imported by one file each, inside functions."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest
from torch.utils._device import _device_constructors

import syncbn

ROOT = Path(syncbn.__file__).parent

# Each layer imports those before it, and none of its own; `syncbn` itself only gathers the names.
LAYERS = [
    {"errors"},
    {"_compiled", "_generated", "_launch", "cluster._addresses"},
    {"_plain", "_epilogue"},
    {"_statistics", "_mask"},
    {"comm._place"},
    {"comm._verdict"},
    {"comm._protocol"},
    {"comm._single", "comm._threads", "comm._shared_memory", "comm._carried", "comm._pairs", "comm._whereabouts"},
    {"comm._mpi", "comm._horovod", "comm._foreign", "comm._hosts", "comm._roll_call", "comm._board", "comm._diagnosis"},
    {"comm._distributed", "comm._served_board"},
    {"comm._watchdog"},
    {"comm._groups"},
    {"comm"},
    {"kernels._protocol"},
    {"kernels._triton_code"},
    {"kernels._composed", "kernels._cpu", "kernels._torch", "kernels._triton"},
    {"kernels._select"},
    {"kernels"},
    {"_checks", "_saved", "_dtensor", "_names"},
    {"_recomputation"},
    {"_autograd"},
    {"_operators", "_joint", "_pending"},
    {"_block"},
    {"functional"},
    {"_layer"},
    {"_own_forward", "_buckets", "_together", "_name_layers"},
    {"_fusion", "_synchronised_class", "_alike"},
    {"_conversion_report"},
    {"_convert", "_launcher", "_parallel", "_population"},
    {"_torch_conversion", "_in_sync", "_optimizer_state"},
    {"_uneven"},
    {""},
    {"cluster._malloc"},
    {"cluster._options", "cluster._hosts", "cluster._network", "cluster._meeting"},
    {"cluster._board"},
    {"cluster._command", "cluster._agent"},
    {"cluster._torchrun", "cluster._over_ssh", "cluster._slurm"},
    {"cluster._mpirun", "cluster._horovodrun"},
    {"cluster._main"},
    {"cluster", "cluster.__main__"},
    {"cli._measure", "cli._report", "cli._horovod_build"},
    {"cli._job", "cli._training"},
    {"cli._bench", "cli._installation", "cli._cluster", "cli._comparison"},
    {"cli._doctor", "cli._model"},
    {"cli._verify"},
    {"cli"},
    {"__main__"},
]
KNOWS_BATCH_NORM = {
    "_epilogue",
    "_statistics",
    "_mask",
    "_checks",
    "_saved",
    "_recomputation",
    "_dtensor",
    "_autograd",
    "_names",
    "_name_layers",
    "_operators",
    "_joint",
    "_pending",
    "_block",
    "functional",
    "_layer",
    "_own_forward",
    "_together",
    "_fusion",
    "_synchronised_class",
    "_conversion_report",
    "_convert",
    "_torch_conversion",
    "_population",
    "_in_sync",
    "_uneven",
}
OPTIONAL = {
    "mpi4py": {"comm._mpi"},
    "horovod": {"comm._horovod"},
    "triton": {"kernels._triton", "kernels._triton_code"},
}
DEFERRED = {"kernels._triton_code": "kernels._triton"}  # imports an optional package at its top: and its only importer


def sources():
    """The package's modules, named relative to it: {"comm._mpi": source}."""
    paths = {path: path.relative_to(ROOT).with_suffix("").parts for path in ROOT.rglob("*.py")}
    return {
        ".".join(parts).removesuffix("__init__").removesuffix("."): path.read_text() for path, parts in paths.items()
    }


SOURCES = sources()


def imported(name, source, *, inside_functions=True):
    """Full names of what a module imports: `from ._x import y` in syncbn.comm gives syncbn.comm._x.y."""
    parts = ["syncbn", *filter(None, name.split("."))]
    package = parts if ROOT.joinpath(*parts[1:]).is_dir() else parts[:-1]
    for node in walk(ast.parse(source), inside_functions):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parent = package[: len(package) - node.level + 1] if node.level else []
            yield from (".".join([*parent, *filter(None, [node.module]), alias.name]) for alias in node.names)


def walk(node, inside_functions):
    for child in ast.iter_child_nodes(node):
        if inside_functions or not isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            yield child
            yield from walk(child, inside_functions)


def own_imports(name, source):
    """Modules of the package that a module imports: the longest known prefix of each name."""
    for full in imported(name, source):
        parts = full.split(".")[1:]
        if full.split(".")[0] == "syncbn" and parts[:1] != ["_native"]:  # compiled: imports nothing
            known = [".".join(parts[:n]) for n in range(len(parts), -1, -1)]
            yield next(module for module in known if module in SOURCES)


def violations(name, source):
    """What a module imports that is not below it."""
    level = next(number for number, layer in enumerate(LAYERS) if name in layer)
    below = set().union(*LAYERS[:level])
    return {module for module in own_imports(name, source) if module not in below}


def test_every_module_has_its_layer():
    assert sorted(SOURCES) == sorted(set().union(*LAYERS))


@pytest.mark.parametrize("name", SOURCES)
def test_imports_run_one_way(name):
    assert not violations(name, SOURCES[name])


@pytest.mark.parametrize("name", [name for name in SOURCES if name.startswith("comm")])
def test_comm_knows_nothing_of_batch_norm(name):
    assert not KNOWS_BATCH_NORM & set(own_imports(name, SOURCES[name]))
    assert not any(full.startswith("torch.nn") for full in imported(name, SOURCES[name]))


@pytest.mark.parametrize("name", [name for name in SOURCES if name.startswith(("comm", "kernels"))])
def test_comm_and_kernels_do_not_know_each_other(name):
    other = {"comm": "kernels", "kernels": "comm"}[name.partition(".")[0]]
    assert not {module for module in own_imports(name, SOURCES[name]) if module.partition(".")[0] == other}


@pytest.mark.parametrize(
    ("name", "source", "found"),
    [
        ("comm._mpi", "from syncbn._layer import SyncBatchNorm", "_layer"),
        ("comm._mpi", "from .._autograd import forward", "_autograd"),
        ("comm._mpi", "from ._groups import resolve", "comm._groups"),
        ("comm._single", "from . import _mpi", "comm._mpi"),
        ("comm._mpi", "def f():\n    import syncbn.functional", "functional"),
        ("_statistics", "from . import _layer", "_layer"),
        ("functional", "import syncbn", ""),
        ("comm", "if True:\n    from ..functional import sync_batch_norm", "functional"),
    ],
)
def test_a_wrong_import_is_seen(name, source, found):
    """Negative control of the tests above."""
    assert violations(name, source) == {found}


def optional_imports(name, source, *, inside_functions=True):
    return {full.split(".")[0] for full in imported(name, source, inside_functions=inside_functions)} & set(OPTIONAL)


@pytest.mark.parametrize("package", OPTIONAL)
def test_one_place_imports_an_optional_package(package):
    importers = {name for name, source in SOURCES.items() if package in optional_imports(name, source)}
    assert importers == OPTIONAL[package]


@pytest.mark.parametrize("name", [name for name in SOURCES if name not in DEFERRED])
def test_optional_packages_are_imported_inside_functions(name):
    assert not optional_imports(name, SOURCES[name], inside_functions=False)


@pytest.mark.parametrize("deferred", DEFERRED)
def test_what_imports_an_optional_package_at_its_top_is_imported_inside_functions(deferred):
    assert {name for name, source in SOURCES.items() if deferred in own_imports(name, source)} == {DEFERRED[deferred]}
    importer = DEFERRED[deferred]
    at_the_top = imported(importer, SOURCES[importer], inside_functions=False)
    assert f"syncbn.{deferred}" not in at_the_top


@pytest.mark.parametrize(
    "source", ["import mpi4py", "from mpi4py import MPI", "try:\n    import horovod.torch as hvd\nfinally: pass"]
)
def test_an_import_at_the_top_is_seen(source):
    """Negative control of the test above."""
    assert optional_imports("_launcher", source, inside_functions=False)
    inside = "def f():\n" + "".join(f"    {line}\n" for line in source.splitlines())
    assert not optional_imports("_launcher", inside, inside_functions=False)
    assert optional_imports("_launcher", inside)


FACTORIES = {
    function.__name__.removeprefix("fft_") for function in _device_constructors()
}  # those that the default device changes
ALWAYS_DEFAULT = {"Tensor", "FloatTensor", "DoubleTensor", "LongTensor"}  # cannot be told otherwise


def on_the_default_device(source):
    """Calls of torch.zeros and its like, however imported, that do not say device=: "line: name"."""
    tree = ast.parse(source)
    imported_names = {
        alias.asname or alias.name: alias.name
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.module == "torch"
        for alias in node.names
    }
    for call in (node for node in ast.walk(tree) if isinstance(node, ast.Call)):
        if isinstance(call.func, ast.Attribute) and isinstance(call.func.value, ast.Name | ast.Attribute):
            name = call.func.attr if ast.unparse(call.func.value).partition(".")[0] == "torch" else ""
        else:
            name = imported_names.get(ast.unparse(call.func), "")
        if name in ALWAYS_DEFAULT or (name in FACTORIES and "device" not in {word.arg for word in call.keywords}):
            yield f"{call.lineno}: {ast.unparse(call.func)}"


@pytest.mark.parametrize("name", SOURCES)
def test_every_tensor_says_on_which_device_it_is_made(name):
    """Or torch.set_default_device would send it elsewhere: native code then reads addresses of another device."""
    assert not list(on_the_default_device(SOURCES[name]))


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("torch.zeros(3)", ["1: torch.zeros"]),
        ("x = f(torch.tensor([1.0], dtype=torch.float64))", ["1: torch.tensor"]),
        ("import torch\ntorch.fft.fftfreq(3)", ["2: torch.fft.fftfreq"]),
        ("from torch import empty as e\ne(3)", ["2: e"]),
        ("torch.randn(3, generator=g)", ["1: torch.randn"]),
        ("torch.Tensor(3)", ["1: torch.Tensor"]),
        ("torch.full((1,), 2, **options)", ["1: torch.full"]),
        ("torch.as_tensor(3, device=x.device)", []),
        ("torch.zeros_like(x), x.new_zeros(3), torch.cat([x]), torch.frombuffer(b), empty(3), x.zeros(3)", []),
    ],
)
def test_a_tensor_that_does_not_say_is_seen(source, found):
    """Negative control of the test above."""
    assert list(on_the_default_device(source)) == found


def loaded_by(statement):
    """Packages in sys.modules of a fresh interpreter."""
    code = f"{statement}; import sys; print(*{{name.split('.')[0] for name in sys.modules}})"
    return set(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split())


def test_import_syncbn_loads_no_optional_package():
    loaded = loaded_by("import syncbn")
    assert "torch" in loaded
    assert not loaded & {"mpi4py", "horovod", "rich", "matplotlib", "sklearn", "tensorboard", "torchvision", "timm"}


@pytest.mark.parametrize(("also", "loaded"), [("", "False"), ("; import syncbn.kernels._triton_code", "True")])
def test_a_layer_on_the_cpu_loads_no_triton_kernels(also, loaded):
    """Nor Triton therefore, though torch._dynamo loads it where it is installed. With a negative control."""
    pytest.importorskip("triton", reason="triton is not installed")
    code = (
        "import syncbn, sys, torch\n"
        "syncbn.SyncBatchNorm(3)(torch.ones(4, 3, requires_grad=True)).sum().backward()"
        f"{also}\nprint('syncbn.kernels._triton_code' in sys.modules)"
    )
    job = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=50)
    assert job.stdout.strip() == loaded


# Run where there is no torch yet, or where its import would double the time to start.
LAUNCHING = "_addresses _malloc _options _hosts _meeting _command _torchrun _over_ssh _mpirun _horovodrun _slurm _main"
BARE = {f"cluster.{name}" for name in LAUNCHING.split(" ")}


@pytest.mark.parametrize("name", sorted(BARE))
def test_launching_needs_the_standard_library_alone(name):
    """But for torchrun's agent, which imports torch inside a function."""
    at_the_top = {full.split(".")[0] for full in imported(name, SOURCES[name], inside_functions=False)}
    assert at_the_top - {"syncbn"} <= sys.stdlib_module_names
    assert set(own_imports(name, SOURCES[name])) <= BARE | {"cluster", "cluster._agent"}


@pytest.mark.parametrize(("words", "loads"), [(["torchrun", "--help"], False), (["agent", "--", "--help"], True)])
def test_the_folder_of_the_launchers_loads_no_torch(words, loads):
    """With a negative control: torchrun's agent does."""
    command = [sys.executable, "-X", "importtime", str(ROOT / "cluster"), *words]
    done = subprocess.run(command, capture_output=True, text=True, timeout=50, check=False)
    assert "usage: " in done.stdout
    assert (" torch\n" in done.stderr) == loads


def test_what_is_sent_to_other_hosts_stands_alone():
    assert not set(own_imports("cluster._addresses", SOURCES["cluster._addresses"]))


def test_a_loaded_package_is_seen():
    """Negative control of the test above."""
    pytest.importorskip("mpi4py", reason="mpi4py is not installed")
    assert "mpi4py" in loaded_by("import mpi4py")


def needs_numpy(name, source):
    """Tell whether NumPy is imported, or a tensor turned into one of its arrays: torch does without it too."""
    attributes = {node.attr for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Attribute)}
    packages = {full.split(".")[0] for full in imported(name, source)}
    return "numpy" in packages or bool(attributes & {"numpy", "from_numpy"})


def test_nothing_needs_numpy():
    assert [name for name, source in SOURCES.items() if needs_numpy(name, source)] == []


@pytest.mark.parametrize(
    "source", ["import numpy as np", "from numpy import array", "x.cpu().numpy()", "torch.from_numpy(x)"]
)
def test_a_need_of_numpy_is_seen(source):
    assert needs_numpy("_layer", source)


def test_public_modules():
    """Every other file starts with an underscore; `kernels`, `cluster` and `cli` gather private files."""
    public = {name for name in SOURCES if not any(part.startswith("_") for part in name.split("."))}
    assert public == {"", "comm", "errors", "functional", "kernels", "cluster", "cli"}


PUBLIC = {
    syncbn: [
        "ConversionReport",
        "SyncBatchNorm",
        "assert_in_sync",
        "average_gradients",
        "broadcast_parameters",
        "convert_sync_batchnorm",
        "fuse_activations",
        "global_mean",
        "init",
        "normalize_together",
        "recompute_statistics",
        "replace_torch_conversion",
        "revert_sync_batchnorm",
        "reverted",
        "saved_statistics",
        "synchronize_statistics",
        "together",
        "valid_positions",
        "world",
    ],
    syncbn.functional: ["sync_batch_norm"],
    syncbn.comm: ["MPI", "Communicator", "Horovod", "SharedMemory", "SingleProcess", "TorchDistributed", "run_threads"],
}


@pytest.mark.parametrize(("module", "name"), [(module, name) for module, names in PUBLIC.items() for name in names])
def test_public_names_are_there_and_documented(module, name):
    assert getattr(module, name).__doc__


def test_every_error_has_the_root():
    for name in syncbn.errors.__all__:
        assert issubclass(getattr(syncbn.errors, name), syncbn.errors.SyncBatchNormError)


def test_a_compiled_module_of_other_sources_is_refused():
    """It would take addresses for others: an abort in malloc, later."""
    code = (
        "import sys, types; sys.modules['syncbn._native'] = types.ModuleType('old')\n"
        "try:\n    import syncbn\n"
        "except ImportError as error:\n    assert 'launch/setup.sh' in str(error), error\n"
        "else:\n    sys.exit('imported')\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=50)

"""Mutation run: change the library a little, at random, and see whether the quick tests notice.

    python tests/mutate.py --count 200 --seed 8 --output runs/mutation

draws that many mutants of the Python core of the tree (this one, or --tree), runs the quick tests of each mutant's area
against it, and writes PREFIX.json and PREFIX.txt: the score by file and the mutants that survived, with their diffs.
Both are written anew after every mutant, so a run that is cut off is worth something. Run it with the Python of an
environment that has the tree's dependencies and its compiled module: TREE/.venv/bin/python tests/mutate.py --tree TREE.
Nothing is written into the tree: the mutants live in a copy.

    python tests/mutate.py --only-survivors runs/mutation.json --output runs/again

tries the survivors of an earlier run once more where they still exist: the same file, source line and mutation.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import difflib
import importlib
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from mutants import Mutant, mutants_of

ROOT = Path(__file__).resolve().parents[1]

# Which tests (tests/test_<name>.py) know a file; those that find most come first. Names that a tree lacks are left out.
# A file that is not here has the tests of its own name.
ARITHMETIC = "kernels autograd collectives precision equivalence extreme layer"
AREAS = {
    "syncbn/_statistics.py": ARITHMETIC,
    "syncbn/_autograd.py": f"{ARITHMETIC} mask",
    "syncbn/_operators.py": "compile tracing transforms together autograd layer mask",
    "syncbn/_plain.py": "kernels layer cuda_kernels",
    "syncbn/_epilogue.py": "kernels layer autograd fusion convert",
    "syncbn/_checks.py": "layer tracing transforms extreme autograd mask",
    "syncbn/_saved.py": "recomputation",
    "syncbn/_recomputation.py": "recomputation autograd layer compile",
    "syncbn/functional.py": "layer precision collectives groups autograd extreme equivalence tracing transforms",
    "syncbn/_layer.py": "layer tracing convert autograd together recomputation after_training",
    "syncbn/_mask.py": "mask",
    "syncbn/_dtensor.py": "dtensor",
    "syncbn/_joint.py": "together_layers",
    "syncbn/_pending.py": "together_layers",
    "syncbn/_block.py": "together_layers",
    "syncbn/_together.py": "together_layers",
    "syncbn/_own_forward.py": "own_forward",
    "syncbn/_synchronised_class.py": "convert own_forward conversion_report",
    "syncbn/_conversion_report.py": "conversion_report",
    "syncbn/_torch_conversion.py": "conversion_report",
    "syncbn/_population.py": "population",
    "syncbn/_in_sync.py": "population",
    "syncbn/_convert.py": "convert conversion_report own_forward fusion layer tracing",
    "syncbn/_generated.py": "convert fusion",
    "syncbn/_fusion.py": "fusion",
    "syncbn/_parallel.py": "parallel",
    "syncbn/_buckets.py": "parallel",
    "syncbn/_alike.py": "parallel uneven",
    "syncbn/_optimizer_state.py": "uneven",
    "syncbn/_names.py": "mismatch compile",
    "syncbn/_name_layers.py": "mismatch uneven",
    "syncbn/comm/_roll_call.py": "uneven",
    "syncbn/comm/_place.py": "mismatch",
    "syncbn/comm/_verdict.py": "mismatch shared_memory",
    "syncbn/comm/_carried.py": "mismatch collectives",
    "syncbn/comm/_foreign.py": "mismatch collectives groups",
    "syncbn/comm/_pairs.py": "mismatch shared_memory communicators",
    "syncbn/comm/_board.py": "watchdog",
    "syncbn/comm/_served_board.py": "watchdog",
    "syncbn/comm/_whereabouts.py": "watchdog",
    "syncbn/comm/_diagnosis.py": "watchdog",
    "syncbn/kernels/_cpu.py": "kernels layer",
    "syncbn/kernels/_torch.py": "cuda_kernels",
    "syncbn/kernels/_triton_code.py": "triton",
    "syncbn/kernels/_composed.py": "kernels autograd precision mask",
    "syncbn/kernels/_select.py": "kernels layer autograd",
    "syncbn/kernels/_protocol.py": "kernels",
    "syncbn/comm/_protocol.py": "communicators threads groups shared_memory parallel mismatch",
    "syncbn/comm/_single.py": "communicators groups layer",
    "syncbn/comm/_threads.py": "threads communicators",
    "syncbn/comm/_groups.py": "groups communicators layer launcher",
    "syncbn/comm/_distributed.py": "communicators groups shared_memory launcher",
    "syncbn/comm/_hosts.py": "shared_memory communicators groups",
    "syncbn/comm/_shared_memory.py": "shared_memory",
    "syncbn/comm/_mpi.py": "communicators groups launcher",
    "syncbn/comm/_horovod.py": "communicators groups launcher",
}
NOT_CORE = {
    "syncbn/_launch.py",
    "syncbn/_launcher.py",
    "syncbn/_torch_version.py",
    "syncbn/_compiled.py",
    "syncbn/__init__.py",
    "syncbn/__main__.py",
    "syncbn/errors.py",
}
AREA_SECONDS = 45.0  # of quick tests for one mutant: the slowest of a larger area are left out
MEMORY = 16 << 30  # bytes of address space of one test process: a mutant may ask for any number

# ---------------------------------------------------------------- where the tests run


class Arena:
    """A copy of the tree. What runs here imports syncbn from it, whatever the environment has installed."""

    def __init__(self, tree: Path, native: str, place: Path) -> None:
        self.place = place
        listing = _output("git", "-C", str(tree), "ls-files", "-z", "--cached", "--others", "--exclude-standard")
        for name in listing.split("\0"):
            if name and (tree / name).is_file():
                (place / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(tree / name, place / name)
        if native:
            shutil.copy(native, place / "syncbn")
        (place / "tmp").mkdir()
        (place / "site").mkdir()
        # For the processes that tests start: the finder of an editable installation would come before the path.
        (place / "site/sitecustomize.py").write_text(
            f"import sys\nsys.meta_path[:] = [f for f in sys.meta_path if {_IS_NOT_EDITABLE}]\n"
        )

    def start(self, arguments: Sequence[str], plugin: Any) -> int:
        """Fork a process that runs pytest here; return its id. Its exit status is pytest's."""
        sys.stdout.flush()
        pid = os.fork()
        if pid:
            return pid
        code = 70  # not one of pytest's
        try:
            self._enter()
            code = int(importlib.import_module("pytest").main([*arguments], plugins=[plugin]))
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)

    def _enter(self) -> None:
        os.setsid()
        os.chdir(self.place)
        log = os.open("log.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        for descriptor in (1, 2):
            os.dup2(log, descriptor)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        signal.signal(signal.SIGINT, signal.default_int_handler)
        tempfile.tempdir = None
        os.environ.update(PYTHONPATH=f"{self.place}:{self.place / 'site'}", TMPDIR=str(self.place / "tmp"))
        os.environ["PYTHONDONTWRITEBYTECODE"] = "1"
        sys.dont_write_bytecode = True  # a mutant has the size and the second of what was there before
        sys.path.insert(0, str(self.place))

    def log(self) -> str:
        return (self.place / "log.txt").read_text(errors="replace")

    def clear(self) -> None:
        shutil.rmtree(self.place / "tmp", ignore_errors=True)
        (self.place / "tmp").mkdir(exist_ok=True)


_IS_NOT_EDITABLE = "not type(f).__module__.startswith('_editable_')"


def become_server(tree: Path) -> str:
    """Import what every run needs, so that a forked process has it; return the path of the compiled module, or ""."""
    code = "from syncbn._compiled import native; print(native.__file__ if native else '')"
    native = _output(sys.executable, "-c", f"import sys; sys.path.remove(''); {code}").strip()
    sys.meta_path[:] = [f for f in sys.meta_path if eval(_IS_NOT_EDITABLE)]
    sys.path[:] = [p for p in sys.path if Path(p or ".").resolve() not in (ROOT, ROOT / "tests", tree)]
    for name in ("pytest", "numpy", "torch", "torch.distributed", "torch._dynamo"):
        with contextlib.suppress(ImportError):  # a tree may do without
            importlib.import_module(name)
    assert not any(name.partition(".")[0] == "syncbn" for name in sys.modules)
    ctypes.CDLL(None).prctl(36, 1)  # PR_SET_CHILD_SUBREAPER: what a test process leaves behind becomes ours to end
    return native


class Watch:
    """A plugin that leaves tests out and notes how long each took."""

    def __init__(self, without: Sequence[str] = (), notes: Path | None = None) -> None:
        self.without = set(without)
        self.notes = notes
        self.seconds: Counter[str] = Counter()

    def pytest_collection_modifyitems(self, items: list[Any]) -> None:
        items[:] = [item for item in items if item.nodeid not in self.without]

    def pytest_runtest_logreport(self, report: Any) -> None:
        self.seconds[report.nodeid] += report.duration

    def pytest_sessionfinish(self) -> None:
        if self.notes:
            self.notes.write_text(json.dumps(self.seconds))


OPTIONS = ("-m", "not launcher", "-x", "-q", "-p", "no:cacheprovider", "--timeout=40")


@dataclass(frozen=True)
class Area:
    """The tests of one file."""

    modules: list[str]
    without: list[str]
    seconds: float  # of what is left


def modules_of(file: str, tree: Path) -> list[str]:
    names = [f"tests/test_{name}.py" for name in AREAS.get(file, Path(file).stem.lstrip("_")).split()]
    found = [name for name in names if (tree / name).is_file()]
    if not found:
        raise SystemExit(f"none of {names} is there: tell AREAS of {__file__} which tests know {file}")
    return [*found, file]  # its doctests


def areas(files: Sequence[str], arena: Arena) -> dict[str, Area]:
    """Run all tests once on the unchanged copy, where they must pass, and time them."""
    modules = {file: modules_of(file, arena.place) for file in files}
    union = list(dict.fromkeys(module for names in modules.values() for module in names))
    notes = arena.place / "seconds.json"
    pid = arena.start([*union, *OPTIONS], Watch(notes=notes))
    _, status = os.waitpid(pid, 0)
    end_orphans(())
    if status:
        raise SystemExit(f"the tests fail without any mutation (wait status {status}):\n{arena.log()[-4000:]}")
    seconds: dict[str, float] = json.loads(notes.read_text())
    return {file: _area(names, seconds) for file, names in modules.items()}


def _area(modules: list[str], seconds: dict[str, float]) -> Area:
    known = {test: took for test, took in seconds.items() if test.partition("::")[0] in modules}
    total, without = sum(known.values()), []
    for test in sorted(known, key=lambda test: known[test], reverse=True):
        if total <= AREA_SECONDS:
            break
        without.append(test)
        total -= known[test]
    return Area(modules, without, total)


def end_orphans(running: Sequence[int]) -> None:
    """Kill what the test processes that ended have left behind: our children but for those that are `running`."""
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) not in running:
            with contextlib.suppress(OSError, IndexError):  # it ended meanwhile
                if int((entry / "stat").read_text().rpartition(")")[2].split()[1]) == os.getpid():
                    os.kill(int(entry.name), signal.SIGKILL)
                    os.waitpid(int(entry.name), 0)


# ---------------------------------------------------------------- the run


@dataclass
class Outcome:
    """What became of a mutant: "killed", "timeout" (which counts as killed) or "survived"."""

    mutant: Mutant
    state: str
    seconds: float
    by: str = ""


@dataclass
class Running:
    pid: int
    mutant: Mutant
    arena: Arena
    original: bytes
    start: float
    deadline: float


@dataclass
class Run:
    """Mutants against their tests, one in each arena at a time."""

    arenas: list[Arena]
    areas: dict[str, Area]
    todo: list[Mutant]
    done: Callable[[Outcome], None]
    running: list[Running] = field(default_factory=list)

    def __call__(self) -> None:
        free = list(self.arenas)
        while self.todo or self.running:
            while free and self.todo:
                self.running.append(self._start(self.todo.pop(0), free.pop()))
            time.sleep(0.02)
            for job in list(self.running):
                outcome = self._look_at(job)
                if outcome:
                    self.running.remove(job)
                    self._clean_up(job)
                    free.append(job.arena)
                    self.done(outcome)

    def _start(self, mutant: Mutant, arena: Arena) -> Running:
        area, path = self.areas[mutant.file], arena.place / mutant.file
        original = path.read_bytes()
        path.write_bytes(mutant.apply(original))
        pid = arena.start([*area.modules, *OPTIONS], Watch(area.without))
        now = time.monotonic()
        return Running(pid, mutant, arena, original, now, now + 30 + 3 * area.seconds)

    def _look_at(self, job: Running) -> Outcome | None:
        pid, status = os.waitpid(job.pid, os.WNOHANG)
        took = time.monotonic() - job.start
        if pid:
            log = job.arena.log()
            if status == 0:
                return Outcome(job.mutant, "survived", took)
            if os.waitstatus_to_exitcode(status) == 5:
                raise SystemExit(f"no tests were run:\n{log[-4000:]}")
            failed = [line for line in log.splitlines() if line.startswith(("FAILED", "ERROR"))]
            return Outcome(job.mutant, "killed", took, failed[0][:200] if failed else f"status {status}")
        if time.monotonic() > job.deadline:
            os.killpg(job.pid, signal.SIGKILL)
            os.waitpid(job.pid, 0)
            return Outcome(job.mutant, "timeout", took)
        return None

    def _clean_up(self, job: Running) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(job.pid, signal.SIGKILL)
        end_orphans([other.pid for other in self.running])
        (job.arena.place / job.mutant.file).write_bytes(job.original)
        job.arena.clear()


# ---------------------------------------------------------------- what comes out


class Results:
    """Writes PREFIX.json and PREFIX.txt after every mutant."""

    def __init__(self, prefix: Path, header: dict[str, Any], tree: Path, planned: int) -> None:
        self.prefix, self.header, self.tree, self.planned = prefix, header, tree, planned
        self.outcomes: list[Outcome] = []
        prefix.parent.mkdir(parents=True, exist_ok=True)

    def add(self, outcome: Outcome) -> None:
        self.outcomes.append(outcome)
        m = outcome.mutant
        count = f"[{len(self.outcomes)}/{self.planned}]"
        print(f"{count} {outcome.state:8} {outcome.seconds:5.1f} s  {m.file}:{m.line}  {m.change[:100]}", flush=True)
        self.write()

    def write(self) -> None:
        score = self.score()
        mutants = [{**asdict(o.mutant), "state": o.state, "seconds": round(o.seconds, 1), "by": o.by}
                   for o in self.outcomes]  # fmt: skip
        everything = {**self.header, "score": score, "mutants": mutants}
        self.prefix.with_suffix(".json").write_text(json.dumps(everything, indent=1))
        self.prefix.with_suffix(".txt").write_text(self._text(score))

    def score(self) -> dict[str, dict[str, Any]]:
        """Count by file, and over all."""
        by_file: dict[str, Counter[str]] = {}
        for outcome in self.outcomes:
            for name in (outcome.mutant.file, "all"):
                by_file.setdefault(name, Counter())[outcome.state] += 1
        names = [*sorted(by_file.keys() - {"all"}), *(["all"] if by_file else [])]
        return {name: {**by_file[name], "score": _score(by_file[name])} for name in names}

    def _text(self, score: dict[str, dict[str, Any]]) -> str:
        lines = [f"{name}: {value}" for name, value in self.header.items()]
        lines += ["", f"{'file':32} {'mutants':>7} {'killed':>7} {'timeout':>7} {'survived':>8} {'score':>6}"]
        for name, row in score.items():
            counts = [row.get(state, 0) for state in ("killed", "timeout", "survived")]
            lines.append(
                f"{name:32} {sum(counts):7} {counts[0]:7} {counts[1]:7} {counts[2]:8} {100 * row['score']:5.0f} %"
            )
        survivors = sorted(
            (o.mutant for o in self.outcomes if o.state == "survived"), key=lambda m: (m.file, m.start, m.change)
        )
        lines += ["", f"{len(survivors)} survived", ""]
        for mutant in survivors:
            lines += [f"{mutant.file}:{mutant.line}  {mutant.change}", *self._diff(mutant), ""]
        return "\n".join(lines)

    def _diff(self, mutant: Mutant) -> list[str]:
        source = (self.tree / mutant.file).read_bytes()
        old, new = (text.decode().splitlines() for text in (source, mutant.apply(source)))
        return list(difflib.unified_diff(old, new, lineterm="", n=1))[2:]


def _score(counts: Counter[str]) -> float:
    return round((counts["killed"] + counts["timeout"]) / counts.total(), 3)


def core(tree: Path) -> list[str]:
    """Return the files of the tree that can be mutated."""
    folders = [tree / "syncbn", tree / "syncbn/kernels", tree / "syncbn/comm"]
    found = {str(path.relative_to(tree)) for folder in folders for path in folder.glob("*.py")}
    return sorted(file for file in found - NOT_CORE if not file.endswith("__init__.py"))


def draw(candidates: list[Mutant], arguments: argparse.Namespace) -> list[Mutant]:
    if not arguments.only_survivors:
        return random.Random(arguments.seed).sample(candidates, min(arguments.count, len(candidates)))
    earlier = json.loads(arguments.only_survivors.read_text())["mutants"]
    keys = {(m["file"], m["text"], m["change"]) for m in earlier if m["state"] == "survived"}
    wanted = {key for key in keys if not arguments.files or key[0] in arguments.files}
    gone = wanted - {m.key() for m in candidates}
    for file, text, change in sorted(gone):
        print(f"gone: {file}: {text}: {change}")
    return [m for m in candidates if m.key() in wanted]


def _output(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tree", type=Path, default=ROOT, help="a git checkout to mutate (this one)")
    parser.add_argument("--count", type=int, default=200, help="mutants to draw (200)")
    parser.add_argument("--seed", type=int, default=8, help="of the draw (8)")
    parser.add_argument("--files", nargs="+", default=[], metavar="FILE", help="only these: syncbn/_parallel.py ...")
    parser.add_argument("--workers", type=int, default=1, help="mutants at a time (1)")
    parser.add_argument("--output", type=Path, default=ROOT / "runs/mutation", metavar="PREFIX", help="(runs/mutation)")
    parser.add_argument("--only-survivors", type=Path, metavar="FILE", help="the .json of an earlier run")
    parser.add_argument("--list", action="store_true", help="print the mutants that would be tried, and stop")
    arguments = parser.parse_args()
    tree = arguments.tree.resolve()
    files = arguments.files or core(tree)
    sources = {file: (tree / file).read_bytes() for file in files}
    candidates = [m for file in files for m in mutants_of(file, sources[file])]
    chosen = draw(candidates, arguments)
    if arguments.list:
        print("\n".join(f"{m.file}:{m.line}  {m.change}" for m in chosen))
        print(f"{len(chosen)} of {len(candidates)}")
        return
    begin = time.monotonic()
    native = become_server(tree)
    with tempfile.TemporaryDirectory(prefix="mutate-") as folder:
        arenas = [Arena(tree, native, Path(folder) / str(i)) for i in range(arguments.workers)]
        known = areas(list(dict.fromkeys(m.file for m in chosen)), arenas[0])
        print(f"all tests pass without a mutation ({time.monotonic() - begin:.0f} s)", flush=True)
        commit = _output("git", "-C", str(tree), "rev-parse", "--short", "HEAD").strip()
        drawn = f"{len(chosen)} of {len(candidates)}"
        header = {"tree": str(tree), "commit": commit, "seed": arguments.seed, "drawn": drawn}
        results = Results(arguments.output, header, tree, len(chosen))
        run = Run(arenas, known, chosen, results.add)
        try:
            run()
        finally:
            for job in run.running:  # interrupted
                os.killpg(job.pid, signal.SIGKILL)
        results.header["minutes"] = round((time.monotonic() - begin) / 60, 1)
        results.write()
        print(json.dumps(results.score().get("all", {})))


if __name__ == "__main__":
    main()

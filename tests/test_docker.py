"""What docker/ says of the rest of the repository; docker/check.sh builds the image and runs it."""

import os
import re
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[1]
DOCKERFILES = ("docker/Dockerfile", "docker/Dockerfile.cuda")


def instructions(dockerfile: str) -> list[str]:
    lines = [line for line in (ROOT / dockerfile).read_text().splitlines() if not line.startswith("#")]
    return [text for text in "\n".join(lines).replace("\\\n", " ").splitlines() if text]


def copied(dockerfile: str) -> list[str]:
    """Return the paths that are copied from the repository."""
    copies = [text.split()[1:-1] for text in instructions(dockerfile) if text.startswith("COPY ")]
    return [path for words in copies if not words[0].startswith("--from") for path in words]


def in_context(path: str) -> bool:
    """Tell what .dockerignore lets through, which allows by whole paths and folders."""
    allowed = [line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")]
    return path == "." or any(path == line or path.startswith(f"{line}/") for line in allowed)


def services() -> dict[str, Any]:
    return yaml.safe_load((ROOT / "docker/compose.yaml").read_text())["services"]


@pytest.mark.parametrize("dockerfile", DOCKERFILES)
def test_copies_what_there_is(dockerfile: str) -> None:
    assert copied(dockerfile)
    for path in copied(dockerfile):
        assert (ROOT / path).exists(), f"{path} is copied into the image but is not in the repository"
        assert in_context(path), f".dockerignore keeps {path} from the build"


@pytest.mark.parametrize("dockerfile", DOCKERFILES)
def test_the_image_has_what_the_scripts_run(dockerfile: str) -> None:
    folder = re.search(r'"\$root/(\S+)" "\$@"', (ROOT / "launch/common.sh").read_text())
    assert folder is not None
    assert {"launch", folder[1]} <= set(copied(dockerfile))


def test_context_has_what_the_build_needs() -> None:
    project = (ROOT / "pyproject.toml").read_text()
    needed = [
        "pyproject.toml",
        "constraints.txt",
        "csrc",
        "syncbn",
        *re.findall(r'(?:readme = |license-files = \[)"(.+?)"', project),
    ]
    assert {"README.md", "LICENSE"} < set(needed)
    assert [path for path in needed if not in_context(path)] == []
    assert not in_context("tests/test_docker.py")
    assert not in_context(".git")
    assert not in_context(".venv-syncbn/bin/python")


@pytest.mark.parametrize("dockerfile", DOCKERFILES)
def test_constraints_pin_every_package(dockerfile: str) -> None:
    text = "\n".join(instructions(dockerfile))
    constrained = text.index("PIP_CONSTRAINT=/opt/syncbn/constraints.txt")
    assert "==" not in text, "versions belong in constraints.txt"
    pinned = {line.split("==")[0] for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line}
    installs = list(re.finditer(r"pip install ([^&\n]+)", text))
    assert installs
    for install in installs:
        assert install.start() > constrained
        names = {word for word in install[1].split() if not word.startswith("'.[")}
        assert names <= pinned, f"not pinned: {names - pinned}"


def test_python_of_the_base_is_the_one_whose_packages_are_trimmed() -> None:
    text = "\n".join(instructions("docker/Dockerfile"))
    assert re.findall(r"FROM python:(3\.\d+)-", text) == re.findall(r"lib/python(3\.\d+)/", text)


def test_final_stages_are_the_same() -> None:
    cpu, cuda = ("\n".join(instructions(dockerfile)).split("FROM base\n") for dockerfile in DOCKERFILES)
    assert len(cpu) == len(cuda) == 2
    assert cpu[1] == cuda[1]
    assert "USER 10000" in cpu[1]
    assert 'HEALTHCHECK --interval=5m --timeout=1m CMD ["python", "-m", "syncbn", "doctor"]' in cpu[1]


@pytest.mark.parametrize("name", services())
def test_services_run_scripts_of_the_image(name: str) -> None:
    words = services()[name]["command"].split()
    copies = copied("docker/Dockerfile")
    scripts = [word for word in words if word.endswith((".sh", ".py"))]
    assert words[0] in scripts
    assert os.access(ROOT / words[0], os.X_OK)
    for script in scripts:
        assert (ROOT / script).is_file()
        assert any(fnmatch(script, path) or script.startswith(f"{path}/") for path in copies), (
            f"{script} is not in the image"
        )


def test_both_torchrun_nodes_get_the_same_command() -> None:
    assert services()["node1"]["command"] == services()["node2"]["command"]


@pytest.mark.parametrize("name", services())
def test_hosts_in_the_commands_are_services(name: str) -> None:
    words = services()[name]["command"].split()
    hosts = [words[words.index("--master") + 1]] if "--master" in words else []
    if "--hosts" in words:
        hosts += [host.split(":")[0] for host in words[words.index("--hosts") + 1].split(",")]
        assert hosts[0] == name, "the first host is the one that the launcher runs on"
        assert set(hosts[1:]) == set(services()[name]["depends_on"])
    assert set(hosts) <= set(services())
    assert services()[name]["hostname"] == name


@pytest.mark.parametrize("name", [name for name, service in services().items() if "depends_on" in service])
def test_a_profile_brings_what_it_depends_on(name: str) -> None:
    for other in services()[name]["depends_on"]:
        assert set(services()[name]["profiles"]) <= set(services()[other]["profiles"])


def test_the_network_is_closed_and_the_nodes_have_no_privileges() -> None:
    compose = yaml.safe_load((ROOT / "docker/compose.yaml").read_text())
    assert compose["networks"]["cluster"]["internal"] is True
    for service in compose["services"].values():
        assert service["networks"] == ["cluster"]
        assert service["cap_drop"] == ["ALL"]
        assert "ports" not in service

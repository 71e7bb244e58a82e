"""The images' caches lie on a volume, whoever runs them."""

import re
from pathlib import Path

import pytest
import yaml

DOCKER = Path(__file__).parent.parent / "docker"


@pytest.mark.parametrize("name", ["Dockerfile", "Dockerfile.cpu"])
def test_caches_are_on_a_volume_that_all_may_write(name: str) -> None:
    """Else every start compiles anew, and a user without a home cannot even keep it."""
    text = (DOCKER / name).read_text()
    places = dict(re.findall(r"(XDG_CACHE_HOME|T\w+_CACHE_DIR)=(\S+)", text))
    assert set(places) == {"XDG_CACHE_HOME", "TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR"}
    root = places["XDG_CACHE_HOME"]
    assert all(place == root or place.startswith(f"{root}/") for place in places.values())
    assert f"install -d -m 1777 {root}" in text
    volumes = re.search(r"VOLUME \[(.*)\]", text)
    assert volumes is not None
    assert f'"{root}"' in volumes[1]
    assert "LOGNAME=" in text  # getpass.getuser() of a user without an entry


def test_compose_keeps_the_caches() -> None:
    compose = yaml.safe_load((DOCKER / "compose.yaml").read_text())
    assert set(compose["volumes"]) == {"cache"}
    for service in compose["services"].values():
        assert "cache:/workspace/cache" in service["volumes"]


@pytest.mark.parametrize("name", ["Dockerfile", "Dockerfile.cpu"])
def test_every_command_is_in_the_image(name: str) -> None:
    """Also in what its build may read, and with the package that compression needs."""
    commands = {path.name for path in DOCKER.parent.glob("*.py")} - {"setup.py"}
    assert {"train.py", "compress.py"} <= commands
    text = (DOCKER / name).read_text()
    copied = re.search(r"^COPY --chown=nvae:nvae (train\.py.*) \S+$", text, re.MULTILINE)
    assert copied is not None
    assert set(copied[1].split()) == commands
    allowed = (DOCKER / f"{name}.dockerignore").read_text().split()
    assert {f"!{command}" for command in commands} <= set(allowed)
    assert "pip install '.[codec]'" in text

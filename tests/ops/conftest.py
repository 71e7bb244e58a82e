from pathlib import Path

import pytest

from .host import HostLauncher, compiler


@pytest.fixture(autouse=True)
def kernel_cache(pytestconfig: pytest.Config, monkeypatch: pytest.MonkeyPatch) -> None:
    """Compiled kernels are kept beside pytest's own cache, not in the user's."""
    assert pytestconfig.cache is not None
    monkeypatch.setenv("NVAE_CACHE_DIR", str(pytestconfig.cache.mkdir("nvae-kernels")))


@pytest.fixture(scope="session")
def host_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where g++'s output is kept, one compilation a variant."""
    if compiler() is None:
        pytest.skip("g++ is not installed")
    return tmp_path_factory.mktemp("host")


@pytest.fixture
def host(host_folder: Path) -> HostLauncher:
    return HostLauncher(host_folder)

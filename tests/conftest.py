import pytest
import torch


@pytest.fixture(autouse=True)
def _deterministic() -> None:
    """Every test starts from the same random state, whatever ran before it."""
    torch.manual_seed(0)


def pytest_configure() -> None:
    """Tests run two at a time; small tensors gain nothing from more threads."""
    torch.set_num_threads(1)


@pytest.fixture
def cuda() -> torch.device:
    """The GPU, for tests marked `gpu`; they are skipped without one."""
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    return torch.device("cuda")

"""Which path runs: a model's choice of kernels reaches every layer, and nothing that is saved."""

import copy
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from nvae.checkpoint import describe
from nvae.models import NVAE, cells, folding
from nvae.models.cells import CELL_FAMILIES
from nvae.models.folding import fold
from nvae.models.layers import DataInitConv2d
from nvae.models.normalization import BatchNorm
from nvae.ops import batch_norm, library
from nvae.ops.library import assuming_kernels
from nvae.sampling.compiled import PriorDecoder
from nvae.training.memory import _EveryRank, on_traced_gpu
from nvae.training.optimizers import Adamax, OptimizerConfig, build_optimizer
from tests.models.small import small_config, small_model

pytestmark = pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor")


class Operations(TorchDispatchMode):
    """Counts the package's ops by name, and depthwise convolutions of PyTorch's."""

    def __init__(self) -> None:
        super().__init__()
        self.ours: Counter[str] = Counter()
        self.depthwise = 0

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        space, name = function._schema.name.split("::")
        self.ours[name] += space == "nvae"
        if name in ("convolution", "cudnn_convolution"):
            x, weight = args[:2]
            self.depthwise += weight.shape[1] == 1 and x.shape[1] == weight.shape[0] > 1
        return function(*args, **(kwargs or {}))


def traced_model(**overrides: Any) -> NVAE:
    """On a GPU that is not there."""
    model = on_traced_gpu(small_model(num_flows=1, **overrides))
    assert isinstance(model, NVAE)
    for module in model.modules():
        if isinstance(module, DataInitConv2d):
            module.checked = True
    model.without_encoder = model.eval  # type: ignore[method-assign] # no copies of such tensors
    return model


@pytest.fixture
def gpu() -> Iterator[None]:
    with FakeTensorMode(), assuming_kernels(True):
        yield


def evaluated(model: NVAE) -> Operations:
    """What an evaluation and a sample run, folded as both commands do."""
    model.eval()
    counted = Operations()
    with torch.no_grad(), counted:
        model(torch.rand(2, 1, 16, 16, device="cuda"), model.draw_noise(2))
        model.sample_logits(2)
    return counted


@pytest.mark.usefixtures("gpu")
def test_evaluation_and_sampling_take_the_kernels() -> None:
    """cuDNN's depthwise convolutions are the slowest of a pass."""
    counted = evaluated(traced_model())
    assert counted.depthwise == 0
    assert counted.ours["bn_swish_depthwise"] > 0
    assert counted.ours["depthwise"] > 0  # after upsampling, and in the flows


@pytest.mark.usefixtures("gpu")
def test_folded_copy_takes_the_kernels() -> None:
    """What is compiled and replayed on a GPU."""
    decoder = PriorDecoder(traced_model())
    counted = Operations()
    with torch.no_grad(), counted:
        decoder(*traced_example(decoder))
    assert counted.depthwise == 0
    assert counted.ours["bn_swish_depthwise"] > 0


@pytest.mark.usefixtures("gpu")
def test_program_that_stands_alone_has_none_of_our_ops() -> None:
    """An exported sampler is run by those who do not have this package."""
    decoder = PriorDecoder(traced_model(), stands_alone=True)
    counted = Operations()
    with torch.no_grad(), counted:
        decoder(*traced_example(decoder))
    assert counted.depthwise > 0
    assert counted.ours.total() == 0


def traced_example(decoder: PriorDecoder) -> tuple[list[torch.Tensor], torch.Tensor]:
    noise = decoder.model.draw_noise(2)
    return noise, torch.ones(len(noise), device="cuda")


@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize("kernels", ["auto", "reference"])
def test_choice_reaches_every_layer_in_training(kernels: str) -> None:
    model = traced_model()
    model.choose_kernels(kernels)
    model.train()
    counted = Operations()
    with counted, model.training_pass():
        model(torch.rand(2, 1, 16, 16, device="cuda"), model.draw_noise(2))
    if kernels == "reference":
        assert counted.ours.total() == 0
    else:
        assert {"bn_swish_depthwise_moments", "channel_moments", "batch_norm", "weight_norms"} <= {
            name for name, count in counted.ours.items() if count
        }


def test_reference_holds_with_synchronized_statistics(monkeypatch: pytest.MonkeyPatch) -> None:
    """There the registered ops are in use on every device."""
    monkeypatch.setattr("torch.distributed.all_reduce", lambda *_, **__: None)
    model = small_model(num_flows=1)
    for module in model.modules():
        if isinstance(module, BatchNorm):
            module.group = _EveryRank()  # type: ignore[assignment]
    for kernels in ("auto", "reference"):
        model.choose_kernels(kernels)
        counted = Operations()
        with counted:
            model(torch.rand(2, 1, 16, 16), model.draw_noise(2))
        assert (counted.ours.total() == 0) == (kernels == "reference")


@pytest.mark.usefixtures("gpu")
def test_changing_the_choice_forgets_what_was_folded() -> None:
    model = traced_model()
    evaluated(model)
    model.choose_kernels("reference")
    counted = evaluated(model)
    assert counted.ours.total() == 0
    assert counted.depthwise > 0
    model.choose_kernels("cuda")
    assert evaluated(model).depthwise == 0


def test_choice_is_no_part_of_the_model() -> None:
    """A checkpoint of a run without kernels opens and resumes anywhere."""
    model = small_model()
    before, keys = describe(model), list(model.state_dict())
    model.choose_kernels("reference")
    assert describe(model) == before
    assert list(model.state_dict()) == keys
    assert "kernels" not in small_config().to_dict()
    assert copy.deepcopy(model).kernels == "reference"
    assert NVAE(model.config).kernels == "auto"


def test_adamax_follows_the_model() -> None:
    def operations(kernels: Any) -> Operations:
        p = nn.Parameter(torch.ones(3))
        p.grad = torch.ones(3)
        optimizer = build_optimizer(OptimizerConfig(), [p], kernels=kernels)
        assert isinstance(optimizer, Adamax)
        counted = Operations()
        with counted:
            optimizer.step()
        assert p[0] != 1
        return counted

    assert operations("auto").ours["adamax_"] == 1
    assert operations("reference").ours.total() == 0


def test_synchronized_formulas_equal_the_ops() -> None:
    """Gradients too, of a rank with itself."""
    group: Any = _EveryRank()
    results = []
    for impl in ("auto", "reference"):
        torch.manual_seed(0)
        x = torch.randn(2, 3, 4, 4, dtype=torch.float64, requires_grad=True)
        gamma = torch.ones(3, dtype=torch.float64, requires_grad=True)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("torch.distributed.all_reduce", lambda *_, **__: None)
            y, statistics = batch_norm(x, gamma, gamma.detach(), group=group, impl=impl)  # type: ignore[arg-type]
            y.square().mul(torch.arange(4.0)).sum().backward()
        results.append((y, *statistics, x.grad, gamma.grad))
    for ours, formula in zip(*results, strict=True):
        assert torch.equal(ours, formula)


@pytest.mark.parametrize("family", list(CELL_FAMILIES))
def test_folded_chain_gives_the_same_numbers(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The CPU passes for a GPU with kernels: the ops in their place, computed by their formulas."""
    torch.manual_seed(0)
    model = small_model(cell_family=family, num_flows=1).double()
    for norm in model.modules():
        if isinstance(norm, BatchNorm):
            norm.running_mean.normal_()
            norm.running_var.uniform_(0.5, 2.0)
    model.eval()
    x, noise = torch.rand(3, 1, 16, 16, dtype=torch.float64), model.draw_noise(3)
    expected = model(x, noise)  # with gradients: nothing is folded
    for module in (cells, folding):
        monkeypatch.setattr(module, "will_take", lambda impl, weight: impl != "reference")
    monkeypatch.setattr(library, "use_kernel", lambda impl, *_: impl != "reference")
    counted = Operations()
    with torch.no_grad(), counted:
        found = fold(copy.deepcopy(model))(x, noise)
    assert counted.depthwise == 0
    assert counted.ours.total() > 0
    torch.testing.assert_close(found.logits, expected.logits, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(found.kl_per_group, expected.kl_per_group, rtol=1e-9, atol=1e-9)


def test_folding_on_the_cpu_makes_plain_layers() -> None:
    """Their numbers are published, and programs are exported from them."""
    folded = fold(small_model(num_flows=1).eval())
    kinds = {type(m).__name__ for m in folded.modules() if isinstance(m, nn.Conv2d)}
    assert kinds == {"_FixedConv2d"}  # torch's convolutions, and no kernel
    assert not [m for m in folded.modules() if isinstance(m, cells._FoldedChain)]

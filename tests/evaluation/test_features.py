"""Features of samples and data: seeds, ranks, caches, and weights that cannot be trusted."""

import pickle
import sys
from pathlib import Path
from urllib.error import URLError

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from nvae.evaluation.extractors import FeatureExtractor, load_extractor
from nvae.evaluation.features import (
    FeatureSet,
    generated_features,
    image_features,
    pool_features,
    reference_features,
    reference_path,
)
from nvae.sampling import sample_images
from tests.sampling.models import small_nvae

ROWS = "tests.evaluation.extractors:Rows"
SIMPLE = "tests.evaluation.extractors:mean_and_spread"


def test_features_are_those_of_the_samples_at_the_temperature_asked_for():
    model, extractor = small_nvae(), load_extractor(SIMPLE)
    for temperature in (0.3, 1.0):
        found = generated_features(
            model, extractor, range(10), temperature=temperature, batch_size=3, keep=True
        )
        images = sample_images(model, range(10), temperature=temperature)
        expected, _ = extractor(images)
        assert torch.allclose(found.features, expected, atol=1e-5)
        assert found.moments.count == 10
        assert np.allclose(found.moments.mean, expected.double().mean(0), atol=1e-6)


def test_features_are_dropped_unless_asked_for():
    found = generated_features(small_nvae(), load_extractor(ROWS), range(4))
    assert found.features is None
    assert found.logits is None
    found = generated_features(small_nvae(), load_extractor(ROWS), range(4), keep_logits=True)
    assert found.logits.shape == (4, 8)


def _rank(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    found = generated_features(
        small_nvae(), load_extractor(ROWS), range(7), keep=True, keep_logits=True,
        distributed=True,
    )  # fmt: skip
    # machines with disks of their own: the first one's counts, and it has none yet
    folder = Path(folder)
    calls = []

    def compute():
        calls.append(rank)
        share = image_features([torch.rand(3, 1, 8, 8)], load_extractor(SIMPLE), keep=True)
        return pool_features(share, 6)

    references = [
        reference_features(folder / f"disk{rank}", {}, compute, keep=True, distributed=True)
        for _ in range(2)
    ]
    torch.save(
        {"calls": calls, "counts": [r.moments.count for r in references],
         "mean": torch.from_numpy(found.moments.mean),
         "covariance": torch.from_numpy(found.moments.covariance),
         "features": found.features, "logits": found.logits},
        f"{folder}/{rank}.pt",
    )  # fmt: skip
    dist.destroy_process_group()


@pytest.mark.slow
def test_two_ranks_with_unequal_shares_give_what_one_gives(tmp_path):
    """Sums are pooled, not covariances averaged; rows come back in the order of the seeds."""
    mp.spawn(_rank, (str(tmp_path),), nprocs=2)
    alone = generated_features(
        small_nvae(), load_extractor(ROWS), range(7), keep=True, keep_logits=True
    )
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    assert torch.allclose(first["features"], alone.features, atol=1e-5)
    assert torch.allclose(first["logits"], alone.logits, atol=1e-4)
    assert second["features"] is second["logits"] is None  # one process compares them
    for pooled in (first, second):
        assert np.allclose(pooled["mean"], alone.moments.mean, atol=1e-6)
        assert np.allclose(pooled["covariance"], alone.moments.covariance, atol=1e-6)
        assert pooled["counts"] == [6, 6]
    # all ranks took part in the features of the data, once, and the first one kept them
    assert first["calls"] == [0]
    assert second["calls"] == [1]
    assert [path.name for path in tmp_path.glob("disk*")] == ["disk0"]


def test_reference_is_computed_once_for_a_protocol(tmp_path):
    calls = []
    images = torch.rand(6, 1, 8, 8, generator=torch.Generator().manual_seed(0))

    def compute(keep):
        calls.append(keep)
        return image_features([images], load_extractor(SIMPLE), keep=keep)

    first = reference_features(tmp_path, {"data": "a"}, lambda: compute(False), keep=False)
    again = reference_features(tmp_path, {"data": "a"}, lambda: compute(False), keep=False)
    assert calls == [False]
    assert np.array_equal(first.moments.covariance, again.moments.covariance)
    kept = reference_features(tmp_path, {"data": "a"}, lambda: compute(True), keep=True)
    assert calls == [False, True]
    assert torch.equal(
        reference_features(tmp_path, {"data": "a"}, lambda: compute(True), keep=True).features,
        kept.features,
    )
    assert len(calls) == 2
    reference_features(tmp_path, {"data": "b"}, lambda: compute(False), keep=False)
    assert len(calls) == 3


def test_a_damaged_cache_is_named(tmp_path):
    path = reference_path(tmp_path, {})
    path.write_bytes(b"PK junk")
    with pytest.raises(ValueError, match="delete it"):
        reference_features(tmp_path, {}, lambda: FeatureSet(None), keep=False)


def test_pixels_reach_the_function_as_bytes():
    seen = []

    def function(pixels):
        seen.append(pixels)
        return pixels.float().flatten(1)

    images = torch.tensor([0.0, 0.5, 1.0, 1.2]).view(1, 1, 2, 2)
    FeatureExtractor("f", function, color=True)(images)
    assert seen[0].dtype == torch.uint8
    assert seen[0][0, 2].flatten().tolist() == [0, 128, 255, 255]
    assert seen[0].shape == (1, 3, 2, 2)


@pytest.mark.parametrize(
    ("attribute", "words"),
    [
        ("no.such.module:f", "cannot be imported"),
        ("tests.evaluation.extractors:missing", "cannot be imported"),
        ("tests.evaluation.extractors", "module:attribute"),
        ("tests.evaluation.extractors:NOT_A_FUNCTION", "not what may be called"),
        ("tests.evaluation.extractors:nn", "not what may be called"),
        ("tests.evaluation.extractors:Tensor", "not what may be called"),
        ("tests.evaluation.extractors:Plain", "not what may be called"),
        ("tests.evaluation.extractors:Needy", "cannot be made"),
        ("os:system", "Python's own"),
        ("os.path:exists", "Python's own"),
        ("builtins:exec", "Python's own"),
        ("subprocess:Popen", "Python's own"),
        ("torch.hub:os", "not what may be called"),
        ("..os:system", "module:attribute"),
        ("tests.evaluation.extractors:pixels.__call__", "module:attribute"),
    ],
)
def test_extractors_that_are_none_are_refused(attribute, words):
    with pytest.raises(ValueError, match=words):
        load_extractor(attribute)


def test_an_extractor_is_named_by_its_code_and_weights(tmp_path, monkeypatch):
    """Reference features kept for the old code must not be compared with the new code's."""
    monkeypatch.syspath_prepend(tmp_path)
    names = set()
    for factor in ("1", "2"):
        (tmp_path / "own_features.py").write_text(
            f"def f(x):\n    return x.flatten(1) / {factor}\n"
        )
        sys.modules.pop("own_features", None)
        names |= {load_extractor("own_features:f").name for _ in range(2)}
    assert len(names) == 2
    names = set()
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        names.add(load_extractor("tests.evaluation.extractors:Weighted").name)
    assert len(names) == 2
    (tmp_path / "broken_features.py").write_text("def f(x:\n")
    with pytest.raises(ValueError, match="cannot be imported"):
        load_extractor("broken_features:f")


@pytest.mark.parametrize("name", ["CALLABLE", "Callable", "mean_and_spread", "Rows"])
def test_extractors_of_every_kind(name):
    features, _ = load_extractor(f"tests.evaluation.extractors:{name}")(torch.zeros(2, 1, 4, 4))
    assert len(features) == 2


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("broken", "failed: ZeroDivisionError"),
        ("not_finite", "features that are not finite"),
        ("three", r"\(B, D\) features, not tuple"),
        ("wrong_logits", r"\(B, D\) logits"),
    ],
)
def test_what_goes_wrong_in_an_extractor_is_one_line(name, words):
    with pytest.raises(ValueError, match=words):
        load_extractor(f"tests.evaluation.extractors:{name}")(torch.zeros(2, 1, 4, 4))


def test_a_module_that_ends_the_program_does_not(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "ends_at_once.py").write_text("raise SystemExit('gone')\n")
    with pytest.raises(ValueError, match="cannot be imported: SystemExit: gone"):
        load_extractor("ends_at_once:f")


def test_an_extractor_of_the_wrong_shape_is_refused():
    with pytest.raises(ValueError, match="must give"):
        load_extractor("tests.evaluation.extractors:shapeless")(torch.zeros(2, 1, 4, 4))


class _Bomb:
    def __reduce__(self):
        return (open, ("exploded", "w"))


def test_inception_weights_are_checked_before_they_are_read(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "inception.pth"
    with pytest.raises(ValueError, match="no Inception weights at"):
        load_extractor(weights=file)
    file.write_bytes(pickle.dumps(_Bomb()))
    with pytest.raises(ValueError, match="expected 6726825d"):
        load_extractor(weights=file)
    from hashlib import sha256

    digest = sha256(file.read_bytes()).hexdigest()
    with pytest.raises(ValueError, match="holds no Inception weights"):
        load_extractor(weights=file, sha256=digest)
    assert not (tmp_path / "exploded").exists()


def test_without_a_network_the_error_says_where_to_put_the_file(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))

    def offline(*_args, **_kwargs):
        raise URLError("no route to host")

    monkeypatch.setattr(torch.hub, "download_url_to_file", offline)
    with pytest.raises(ValueError, match=r"inception_weights=FILE.*checkpoints"):
        load_extractor()


@pytest.mark.slow
def test_inception_itself_runs_on_weights_of_its_shape(tmp_path):
    """The published weights are not at hand in a test; their shapes are."""
    from hashlib import sha256

    from torch_fidelity import feature_extractor_inceptionv3 as module

    class Bare(module.FeatureExtractorInceptionV3):
        def load_state_dict(self, *_args, **_kwargs):
            return None

    torch.manual_seed(0)
    torch.save({}, tmp_path / "empty.pth")
    network = Bare("bare", ["2048"], str(tmp_path / "empty.pth"))
    file = tmp_path / "inception.pth"
    torch.save(network.state_dict(), file)
    extractor = load_extractor(weights=file, sha256=sha256(file.read_bytes()).hexdigest()[:12])
    features, logits = extractor(torch.rand(2, 1, 32, 32))
    assert features.shape == (2, 2048)
    assert logits.shape == (2, 1008)
    expected = network((torch.zeros(2, 3, 32, 32)).to(torch.uint8))[0]
    again, _ = extractor(torch.zeros(2, 1, 32, 32))
    assert torch.allclose(again, expected, atol=1e-5)

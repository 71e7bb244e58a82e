"""Sample quality in evaluate.py: mistakes found early, nothing computed twice or lost."""

import json
import os
import sys
from contextlib import nullcontext

import pytest
import torch
import torch.multiprocessing as mp

from nvae.cli import evaluate as evaluate_module
from nvae.cli.evaluate import main
from nvae.data.loader import DenseSplit
from nvae.evaluation import RecordStore
from tests.evaluation.extractors import Rows
from tests.training.ranks import free_port

EXTRACTOR = "feature_extractor=tests.evaluation.extractors:Rows"


def test_metrics_compare_samples_with_data_and_say_how(evaluate, checkpoint, tmp_path):
    common = (
        *(f"checkpoint={checkpoint}", "importance_samples=[]", EXTRACTOR, "generated=30"),
        *("kid_subset_size=20", "metrics=[fid,kid,prdc,is]", "reference_cache=cache"),
    )
    printed = evaluate(*common, "output=a.json", "temperature=0.7", "sample_batch_size=8")
    found = json.loads((tmp_path / "a.json").read_text())
    quality = found["samples"]
    assert {"fid", "kid", "precision", "recall", "density", "coverage"} < quality.keys()
    assert quality["inception_score"] >= 1
    assert quality["generated"] == 30
    assert quality["real"] == 24
    assert f"{quality['fid']:.4f}" in printed
    protocol = found["protocol"]["samples"]
    assert protocol["temperature"] == 0.7
    assert protocol["extractor"].startswith("tests.evaluation.extractors:Rows ")
    assert len(list((tmp_path / "cache").iterdir())) == 1
    evaluate(*common, "output=b.json", "temperature=0.0", "sample_batch_size=7")
    other = json.loads((tmp_path / "b.json").read_text())["samples"]
    assert other["fid"] != quality["fid"]


def test_metrics_fail_before_any_work_without_weights(evaluate, checkpoint, tmp_path, monkeypatch):
    from urllib.error import URLError

    def offline(*_args, **_kwargs):
        raise URLError("no route to host")

    def worked(*_args, **_kwargs):
        raise AssertionError("work began before the weights were there")

    monkeypatch.setattr("torch.hub.get_dir", lambda: str(tmp_path / "hub"))
    monkeypatch.setattr("torch.hub.download_url_to_file", offline)
    monkeypatch.setattr("nvae.cli.evaluate.evaluate", worked)
    error = evaluate.fails(f"checkpoint={checkpoint}", "metrics=[fid]")
    assert "inception_weights=FILE" in error
    assert "no Inception weights" in evaluate.fails(
        f"checkpoint={checkpoint}", "metrics=[fid]", "inception_weights=missing.pth"
    )


@pytest.fixture
def no_work(monkeypatch):
    def worked(*_args, **_kwargs):
        raise AssertionError("work began before the mistake was found")

    for name in ("evaluate.evaluate", "evaluation_run.recalibrated", "evaluate.measure"):
        monkeypatch.setattr(f"nvae.cli.{name}", worked)


@pytest.mark.usefixtures("no_work")
@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("metrics=[kid]", "kid_subset_size=25"), "only 24 real images"),
        (("metrics=[prdc]", "neighbors=24"), "more than 24 real"),
        (("metrics=[prdc]", "generated=5"), "more than 5 generated"),
        (("metrics=[is]", "generated=9"), "is_splits is 10"),
        (("metrics=[is]", "feature_extractor=nvae.evaluation.extractors:pixels"), "class logits"),
        (("metrics=[fid]", "feature_extractor=tests.evaluation.extractors:shapeless"), "must give"),
    ],
)
def test_impossible_metrics_fail_before_any_work(evaluate, checkpoint, tmp_path, arguments, words):
    """The likelihood takes hours, and a mistake in the metrics used to show after it."""
    common = (f"checkpoint={checkpoint}", EXTRACTOR, "generated=30", "recalibrate_bn=2")
    assert words in evaluate.fails(*common, *arguments)
    assert [f.name for f in tmp_path.iterdir()] == ["model.ckpt"]


@pytest.mark.usefixtures("no_work")
@pytest.mark.parametrize(
    ("processes", "words"), [(21, "generated: 20 images"), (25, "reference_split: 24 images")]
)
def test_more_processes_than_images_fail_before_any_work(
    evaluate, checkpoint, monkeypatch, processes, words
):
    monkeypatch.setattr("nvae.cli.evaluate.process_group", lambda: nullcontext((0, processes)))
    common = (f"checkpoint={checkpoint}", EXTRACTOR, "metrics=[fid]", "device=cpu")
    assert words in evaluate.fails(*common, "generated=20")


def test_the_likelihood_survives_a_failure_of_the_metrics(
    evaluate, checkpoint, tmp_path, monkeypatch
):
    """Hours of K = 1000: other settings of sample quality must find them done."""
    common = (
        *(f"checkpoint={checkpoint}", "importance_samples=[1,4]", EXTRACTOR, "metrics=[fid]"),
        "reference_cache=cache",
    )

    def fail(*_args, **_kwargs):
        raise ValueError("the reference cache is damaged")

    with monkeypatch.context() as patch:
        patch.setattr("nvae.cli.evaluate.measure", fail)
        evaluate.fails(*common, "generated=30")
    computed = []
    with monkeypatch.context() as patch:
        patch.setattr(RecordStore, "add", lambda _self, part: computed.append(part))
        evaluate(
            *common, "generated=20", "temperature=0.7",
            "feature_extractor=tests.evaluation.extractors:mean_and_spread",
        )  # fmt: skip
    assert computed == []
    (written,) = (tmp_path / "evaluation").iterdir()  # and no folder of finished images
    found = json.loads(written.read_text())
    assert found["samples"]["generated"] == 20
    evaluate(f"checkpoint={checkpoint}", "importance_samples=[1,4]", "output=alone.json")
    assert found["result"] == json.loads((tmp_path / "alone.json").read_text())["result"]


def _process(rank, folder, port, arguments):
    """evaluate.py as torchrun starts it; writes of how many images features were taken, and how
    many were read."""
    torch.set_num_threads(1)
    environment = {"RANK": rank, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in environment.items()})
    seen, forward, read, gather = [], Rows.forward, [], DenseSplit.gather

    def counted(self, images):
        seen.append(len(images))
        return forward(self, images)

    def counted_too(self, index, **options):
        read.append(len(index))
        return gather(self, index, **options)

    Rows.forward, DenseSplit.gather = counted, counted_too
    if rank != 0:
        evaluate_module.distances = None  # the first one's business alone
    sys.argv = ["evaluate.py", *arguments]
    main()
    (folder / f"{rank}.json").write_text(json.dumps([sum(seen), sum(read)]))


@pytest.mark.slow
def test_two_processes_share_the_data_images_and_agree_with_one(evaluate, checkpoint, tmp_path):
    common = (
        *(f"checkpoint={checkpoint}", "importance_samples=[2]", EXTRACTOR, "generated=31"),
        *("kid_subset_size=20", "metrics=[fid,kid,prdc,is]", "device=cpu", "data.num_workers=0"),
    )
    evaluate(*common, "output=one.json", "reference_cache=one")
    shared = (*common, f"output={tmp_path}/two.json", f"reference_cache={tmp_path}/two")
    mp.spawn(_process, (tmp_path, free_port(), shared), nprocs=2)
    one, two = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("one", "two"))
    assert one["protocol"] == two["protocol"]
    assert two["samples"] == pytest.approx(one["samples"], rel=1e-4)
    nll = [r["result"]["importance_weighted"][0]["nll"]["mean"] for r in (one, two)]
    assert nll[0] == pytest.approx(nll[1], rel=1e-5)
    seen = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)]
    # of the trial, data images, samples; of the likelihood and the data images, its share alone
    assert seen == [[2 + 12 + 16, 6 + 12], [2 + 12 + 15, 6 + 12]]
    # the features that two processes left are those that one finds, image by image
    evaluate(*common, "output=again.json", "reference_cache=two")
    again = json.loads((tmp_path / "again.json").read_text())
    assert again["samples"] == pytest.approx(one["samples"], rel=1e-6)
    assert len(list((tmp_path / "two").iterdir())) == 1

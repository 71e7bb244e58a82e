"""evaluate.py as a user calls it: files, resuming, and one line for every mistake."""

import argparse
import json
import pickle

import pytest
import torch

from nvae.cli.evaluate import main
from nvae.cli.evaluate_config import EvaluateConfig
from nvae.evaluation import records
from nvae.export.folder import export

from .checkpoints import write_checkpoint
from .commands import Commands


@pytest.fixture
def evaluate(tmp_path, monkeypatch, capsys):
    return Commands(main, monkeypatch, capsys, tmp_path)


@pytest.fixture
def checkpoint(tmp_path):
    return write_checkpoint(tmp_path / "model.ckpt")


K = "importance_samples=[1,4]"


def test_writes_json_that_says_how_to_repeat_it(evaluate, checkpoint, tmp_path):
    printed = evaluate(f"checkpoint={checkpoint}", K, "output=result.json", "seed=3")
    found = json.loads((tmp_path / "result.json").read_text())
    result, protocol = found["result"], found["protocol"]
    assert result["images"] == 12
    assert [bound["samples"] for bound in result["importance_weighted"]] == [1, 4]
    assert result["negative_elbo"]["mean"] == pytest.approx(
        result["reconstruction"]["mean"] + result["kl"]["mean"]
    )
    assert len(result["kl_per_group"]) == len(result["active_units"]) == 3
    assert protocol["seed"] == 3
    assert protocol["split"] == "test"
    assert protocol["weights"] == "raw"
    assert protocol["batch_norm"] == "running statistics"
    assert protocol["data"]["name"] == "random"
    assert len(protocol["checkpoint_sha256"]) == 64
    assert {"python", "torch", "device"} <= found["versions"].keys()
    assert f"{result['negative_elbo']['mean']:.3f}" in printed
    assert [f.name for f in tmp_path.iterdir() if "partial" in f.name] == []


def test_exported_folder_gives_the_checkpoints_numbers(evaluate, checkpoint, tmp_path):
    """It does not say what it was trained on: the data set is named on the command line."""
    export(checkpoint, tmp_path / "exported", with_sampler=False)
    assert "give data=NAME" in evaluate.fails("checkpoint=exported", K)
    evaluate(f"checkpoint={checkpoint}", "data=digits", K, "output=a.json")
    evaluate("checkpoint=exported", "data=digits", K)
    (written,) = (tmp_path / "exported" / "evaluation").iterdir()
    a, b = (json.loads(path.read_text()) for path in (tmp_path / "a.json", written))
    assert a["result"] == b["result"]
    assert b["protocol"]["weights"] == "exported"


def test_numbers_do_not_depend_on_batches_and_chunks(evaluate, checkpoint, tmp_path):
    evaluate(f"checkpoint={checkpoint}", K, "output=a.json")
    evaluate(
        f"checkpoint={checkpoint}", K, "output=b.json", "chunk=3", "data.eval_batch_size=7",
        "data.num_workers=0",
    )  # fmt: skip
    a, b = (json.loads((tmp_path / name).read_text()) for name in ("a.json", "b.json"))
    assert a["protocol"] == b["protocol"]
    for key in ("negative_elbo", "kl", "reconstruction"):
        assert a["result"][key]["mean"] == pytest.approx(b["result"][key]["mean"], rel=1e-5)
    nll = [r["result"]["importance_weighted"][1]["nll"]["mean"] for r in (a, b)]
    assert nll[0] == pytest.approx(nll[1], rel=1e-5)


def test_default_output_lies_beside_the_checkpoint_and_is_not_computed_twice(
    evaluate, checkpoint, monkeypatch
):
    evaluate(f"checkpoint={checkpoint}", K)
    (file,) = (checkpoint.parent / "evaluation").glob("model-test-*.json")
    before = file.stat().st_mtime_ns
    assert "done before" in evaluate(f"checkpoint={checkpoint}", K)
    assert file.stat().st_mtime_ns == before
    evaluate(f"checkpoint={checkpoint}", K, "split=valid")
    assert len(list((checkpoint.parent / "evaluation").glob("*.json"))) == 2


def test_a_killed_evaluation_goes_on(evaluate, checkpoint, tmp_path, monkeypatch):
    evaluate(f"checkpoint={checkpoint}", K, "output=whole.json")
    computed = []
    original = records.RecordStore.add

    def kill_after_seven(self, part):
        computed.extend(part.index.tolist())
        original(self, part)
        if len(computed) >= 7:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(records.RecordStore, "add", kill_after_seven)
        with pytest.raises(KeyboardInterrupt):
            evaluate(f"checkpoint={checkpoint}", K, "output=resumed.json", "chunk=4")
    assert not (tmp_path / "resumed.json").exists()
    again = []

    def watch(self, part):
        again.extend(part.index.tolist())
        original(self, part)

    with monkeypatch.context() as patch:
        patch.setattr(records.RecordStore, "add", watch)
        evaluate(f"checkpoint={checkpoint}", K, "output=resumed.json", "chunk=4")
    assert sorted(computed + again) == list(range(12))
    whole, resumed = (
        json.loads((tmp_path / f"{name}.json").read_text()) for name in ("whole", "resumed")
    )
    assert resumed["result"]["negative_elbo"]["mean"] == pytest.approx(
        whole["result"]["negative_elbo"]["mean"], rel=1e-5
    )


def test_recalibrated_statistics_change_the_numbers_and_are_named(evaluate, checkpoint, tmp_path):
    evaluate(f"checkpoint={checkpoint}", "importance_samples=[]", "output=a.json")
    evaluate(
        f"checkpoint={checkpoint}", "importance_samples=[]", "output=b.json", "recalibrate_bn=2",
        "bn_batch_size=8",
    )  # fmt: skip
    a, b = (json.loads((tmp_path / name).read_text()) for name in ("a.json", "b.json"))
    assert a["result"]["negative_elbo"] != b["result"]["negative_elbo"]
    assert b["protocol"]["batch_norm"]["batches"] == 2
    assert len(list(tmp_path.glob("model.bn-t1-*.pt"))) == 1


EXTRACTOR = "feature_extractor=tests.metrics.extractors:Rows"


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
    assert protocol["extractor"] == "tests.metrics.extractors:Rows"
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


def test_another_data_set_can_be_named_and_must_fit(evaluate, checkpoint, tmp_path):
    evaluate(
        f"checkpoint={checkpoint}", "importance_samples=[]", "data=digits", "output=digits.json"
    )
    found = json.loads((tmp_path / "digits.json").read_text())
    assert found["protocol"]["data"]["name"] == "digits"
    assert "data.image_size=32" in evaluate.fails(f"checkpoint={checkpoint}", "data=cifar10")
    assert "data.bits=3" in evaluate.fails(f"checkpoint={checkpoint}", "data.bits=3")
    bare = write_checkpoint(tmp_path / "bare.ckpt", with_data=False)
    assert "give data=NAME" in evaluate.fails(f"checkpoint={bare}")


class _Bomb:
    def __reduce__(self):
        return (open, ("exploded", "w"))


def test_bad_checkpoints_are_one_line_and_nothing_runs(evaluate, checkpoint, tmp_path):
    assert "no checkpoint at" in evaluate.fails("checkpoint=missing.ckpt")
    whole = checkpoint.read_bytes()
    checkpoint.write_bytes(whole[: len(whole) // 2])
    assert "model.ckpt" in evaluate.fails(f"checkpoint={checkpoint}")
    with (tmp_path / "hostile.ckpt").open("wb") as file:
        torch.save({"state_dict": _Bomb(), "args": argparse.Namespace()}, file)
    evaluate.fails("checkpoint=hostile.ckpt")
    (tmp_path / "pickle.ckpt").write_bytes(pickle.dumps(_Bomb()))
    evaluate.fails("checkpoint=pickle.ckpt")
    torch.save([1, 2], tmp_path / "list.ckpt")
    evaluate.fails("checkpoint=list.ckpt")
    assert not (tmp_path / "exploded").exists()
    assert not (tmp_path / "evaluation").exists()


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"split": "all"}, "allowed: train, valid, test"),
        ({"weights": "best"}, "allowed: ema, raw"),
        ({"chunk": 0}, "at least 1"),
        ({"elbo_samples": 0}, "at least 1"),
        ({"recalibrate_bn": -1}, "at least 0"),
        ({"output": "result.txt"}, ".json"),
        ({"metrics": ["lpips"]}, "allowed: fid, kid, prdc, is"),
        ({"metrics": ["kid"], "generated": 100}, "kid_subset_size"),
        ({"temperature": -1.0}, "0 or more"),
        ({"bn_temperature": -1.0}, "0 or more"),
        ({"pixel_temperature": "mode"}, "mean"),
        ({"generated": 1}, "at least 2"),
    ],
)
def test_wrong_settings_are_refused(settings, words):
    with pytest.raises(ValueError, match=words):
        EvaluateConfig("model.ckpt", **settings)


@pytest.mark.parametrize(
    ("argument", "words"),
    [
        ("device=tpu", "allowed: auto, cpu, cuda"),
        ("importance_samples=[0]", "every K"),
        ("importance_samples=many", "importance_samples"),
        ("chekpoint=x", "did you mean checkpoint?"),
        ("data.rot=x", "did you mean root?"),
        ("data=cifra10", "cifar10"),
    ],
)
def test_mistakes_are_one_line_and_leave_nothing(evaluate, checkpoint, tmp_path, argument, words):
    assert words in evaluate.fails(f"checkpoint={checkpoint}", argument)
    assert [f.name for f in tmp_path.iterdir()] == ["model.ckpt"]


def test_out_of_memory_says_what_to_lower(evaluate, checkpoint, monkeypatch):
    def too_much(*_args, **_kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate everything")

    monkeypatch.setattr("nvae.cli.evaluate.evaluate", too_much)
    assert "lower chunk" in evaluate.fails(f"checkpoint={checkpoint}")


def test_other_results_are_not_overwritten(evaluate, checkpoint, tmp_path):
    file = tmp_path / "notes.json"
    file.write_text('{"mine": true}')
    error = evaluate.fails(f"checkpoint={checkpoint}", K, "output=notes.json")
    assert "overwrite=true" in error
    assert file.read_text() == '{"mine": true}'
    evaluate(f"checkpoint={checkpoint}", K, "output=notes.json", "overwrite=true")
    assert "result" in json.loads(file.read_text())


def test_a_checkpoint_is_required(evaluate):
    assert "checkpoint" in evaluate.fails()

"""evaluate.py as a user calls it: files, resuming, and one line for every mistake."""

import argparse
import json
import pickle
from datetime import timedelta

import pytest
import torch
from PIL import Image

from nvae.cli.evaluate import main
from nvae.cli.evaluate_config import EvaluateConfig
from nvae.cli.evaluation_run import already_done, rank_device
from nvae.evaluation import RecordStore
from nvae.export.folder import export

from .checkpoints import write_checkpoint

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


def test_other_pictures_are_another_evaluation(evaluate, checkpoint, tmp_path):
    """Two folders with the same settings: the second must not be told the first one's numbers."""
    for name, level in (("dark", 10), ("bright", 200)):
        (tmp_path / name).mkdir()
        for i in range(30):
            image = Image.new("L", (8, 8), level + i)
            image.putpixel((i % 8, 0), 255)
            image.save(tmp_path / name / f"{i}.png")
    settings = (
        "data=folder", "data.image_size=8", "data.channels=1", "data.bits=4",
        "data.likelihood=logistic_mixture", "split=train", "importance_samples=[]",
        "metrics=[fid]", "feature_extractor=nvae.evaluation.extractors:pixels", "generated=30",
        "reference_split=train",
    )  # fmt: skip
    found = []
    for name in ("dark", "bright"):
        evaluate(f"checkpoint={checkpoint}", *settings, f"data.root={name}", f"output={name}.json")
        found.append(json.loads((tmp_path / f"{name}.json").read_text()))
    first, second = found
    assert first["protocol"]["data"]["sha256"] != second["protocol"]["data"]["sha256"]
    assert first["result"]["negative_elbo"] != second["result"]["negative_elbo"]
    assert first["samples"]["fid"] != second["samples"]["fid"]


def test_numbers_do_not_depend_on_batches_and_chunks(evaluate, checkpoint, tmp_path):
    evaluate(f"checkpoint={checkpoint}", K, "output=a.json")
    evaluate(
        f"checkpoint={checkpoint}", K, "output=b.json", "chunk=3", "data.eval_batch_size=7",
        "data.num_workers=0", "data.seed=5", "data.flip=true", "data.global_batch=4",
    )  # fmt: skip
    a, b = (json.loads((tmp_path / name).read_text()) for name in ("a.json", "b.json"))
    assert a["protocol"] == b["protocol"]
    for key in ("negative_elbo", "kl", "reconstruction"):
        assert a["result"][key]["mean"] == pytest.approx(b["result"][key]["mean"], rel=1e-5)
    nll = [r["result"]["importance_weighted"][1]["nll"]["mean"] for r in (a, b)]
    assert nll[0] == pytest.approx(nll[1], rel=1e-5)


def test_the_first_images_alone(evaluate, checkpoint, tmp_path, monkeypatch):
    """In a result that cannot be taken for one of the whole split."""
    seen = []
    original = RecordStore.add

    def watch(self, part):
        seen.extend(part.index.tolist())
        original(self, part)

    monkeypatch.setattr(RecordStore, "add", watch)
    for more, images in ("max_images=5", 5), ("max_images=100", 12), ("max_images=null", 12):
        seen.clear()
        evaluate(f"checkpoint={checkpoint}", K, more, "output=part.json", "overwrite=true")
        found = json.loads((tmp_path / "part.json").read_text())
        assert seen == list(range(images))
        assert found["result"]["images"] == images
        assert ("max_images" in found["protocol"]) == (more != "max_images=null")
    assert "max_images" in evaluate.fails(f"checkpoint={checkpoint}", "max_images=0")


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
    original = RecordStore.add

    def kill_after_seven(self, part):
        computed.extend(part.index.tolist())
        original(self, part)
        if len(computed) >= 7:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(RecordStore, "add", kill_after_seven)
        with pytest.raises(SystemExit, match="130"):
            evaluate(f"checkpoint={checkpoint}", K, "output=resumed.json", "chunk=4")
    assert not (tmp_path / "resumed.json").exists()
    again = []

    def watch(self, part):
        again.extend(part.index.tolist())
        original(self, part)

    with monkeypatch.context() as patch:
        patch.setattr(RecordStore, "add", watch)
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
    assert len(list(tmp_path.glob("model.bn-t1-*.npz"))) == 1


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


def test_statistics_that_cannot_be_kept_are_used_all_the_same(
    checkpoint, tmp_path, monkeypatch, capsys
):
    """A read-only folder of checkpoints must not make recalibration impossible."""

    def read_only(*_args, **_kwargs):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("nvae.bn_recalibration.write_arrays", read_only)
    arguments = (
        *(f"checkpoint={checkpoint}", f"output={tmp_path}/result.json", "importance_samples=[]"),
        *("recalibrate_bn=1", "bn_batch_size=8"),
    )
    monkeypatch.setattr("sys.argv", ["evaluate.py", *arguments])
    main()
    assert json.loads((tmp_path / "result.json").read_text())["result"]["images"] == 12
    told = [line for line in capsys.readouterr().err.splitlines() if "Permission denied" in line]
    assert len(told) == 1
    assert "not kept" in told[0]
    assert not list(tmp_path.glob("*.bn-*"))


def test_every_process_has_its_own_gpu():
    """torchrun's number of the process would silently take the place of the one that was given."""
    config = EvaluateConfig("model.ckpt", device="cuda:1")
    with pytest.raises(ValueError, match="device=cuda:1 is one GPU, and there are 2 processes"):
        rank_device(config, 0, 2)


def test_one_process_says_that_it_was_done_before(tmp_path, capsys):
    (tmp_path / "r.json").write_text('{"protocol": {}}')
    assert already_done(tmp_path / "r.json", {}, overwrite=False, shown=False)
    assert capsys.readouterr().out == ""


def test_processes_wait_for_each_other_for_hours(evaluate, checkpoint, monkeypatch):
    """Their shares are equal, their GPUs need not be: torch's own limit is half an hour."""
    seen = []

    def group(_backend, *, timeout):
        seen.append(timeout)
        raise ValueError("as far as this test goes")

    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr("torch.distributed.init_process_group", group)
    evaluate.fails(f"checkpoint={checkpoint}", K)
    assert seen[0] >= timedelta(days=1)


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


def test_insisting_on_kernels_needs_a_gpu(evaluate, checkpoint):
    said = evaluate.fails(f"checkpoint={checkpoint}", "device=cpu", "kernels=cuda")
    assert "kernels=cuda needs an NVIDIA GPU, but the device is cpu" in said


@pytest.mark.parametrize(
    ("argument", "words"),
    [
        ("device=tpu", "allowed: auto, cpu, cuda"),
        ("kernels=fast", "allowed: auto, reference, cuda"),
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

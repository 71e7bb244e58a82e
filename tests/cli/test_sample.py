"""sample.py as a user calls it: every mode's files, seeds, and one line for every mistake."""

import json
import re

import numpy as np
import pytest
import torch
from PIL import Image

from nvae.cli.sample import main
from nvae.cli.sample_config import SampleConfig, integers
from nvae.cli.sample_folder import SampleFolder
from nvae.export.folder import export
from nvae.pictures import View

from .checkpoints import write_checkpoint
from .commands import Commands


@pytest.fixture
def sample(tmp_path, monkeypatch, capsys):
    return Commands(main, monkeypatch, capsys, tmp_path)


def _manifest(folder):
    manifest = json.loads((folder / "manifest.json").read_text())
    found = sorted(
        str(f.relative_to(folder))
        for f in folder.rglob("*")
        if f.is_file() and f.name != "manifest.json"
    )
    assert manifest["files"] == found
    return manifest


def test_prior_writes_grids_images_and_arrays(sample, checkpoint, tmp_path):
    sample(
        f"checkpoint={checkpoint}", "temperature=[0.5,1.0]", "seeds=3-8", "npz=true", "output=out"
    )
    manifest = _manifest(tmp_path / "out")
    assert manifest["request"]["temperature"] == [0.5, 1.0]
    assert len(manifest["request"]["checkpoint_sha256"]) == 64
    arrays = np.load(tmp_path / "out" / "samples.npz")
    assert arrays["images"].shape == (2, 6, 1, 8, 8)
    assert arrays["seeds"].tolist() == [3, 4, 5, 6, 7, 8]
    assert arrays["group_temperatures"].tolist() == [[0.5] * 3, [1.0] * 3]
    picture = np.asarray(Image.open(tmp_path / "out" / "t0.5" / "seed000004.png"))
    assert np.abs(picture / 255 - arrays["images"][0, 1, 0]).max() <= 0.5 / 255 + 1e-6


def test_exported_folder_gives_the_checkpoints_pictures(sample, checkpoint, tmp_path):
    export(checkpoint, tmp_path / "exported", with_sampler=False)
    sample(f"checkpoint={checkpoint}", "seeds=0-3", "npz=true", "output=a")
    sample("checkpoint=exported", "seeds=0-3", "npz=true")
    (written,) = (tmp_path / "exported" / "samples").iterdir()
    a, b = (np.load(folder / "samples.npz")["images"] for folder in (tmp_path / "a", written))
    assert np.array_equal(a, b)


def test_a_seed_gives_one_image_whatever_else_is_drawn(sample, checkpoint, tmp_path):
    common = (f"checkpoint={checkpoint}", "npz=true", "pixel_temperature=1")
    sample(*common, "seeds=0-9", "batch_size=4", "output=many")
    sample(*common, "seeds=[7,2]", "batch_size=1", "output=few")
    many, few = (np.load(tmp_path / n / "samples.npz")["images"] for n in ("many", "few"))
    assert np.allclose(many[0, [7, 2]], few[0], atol=1e-5)


def test_scale_and_group_temperatures_agree_where_they_mean_the_same(sample, checkpoint, tmp_path):
    common = (f"checkpoint={checkpoint}", "npz=true", "seeds=0-3")
    sample(*common, "scale_temperatures=[0.5,0.9]", "output=scale")
    sample(*common, "group_temperatures=[0.5,0.9,0.9]", "output=group")
    a, b = (np.load(tmp_path / n / "samples.npz")["images"] for n in ("scale", "group"))
    assert np.array_equal(a, b)
    assert "3 temperatures for 2" in sample.fails(*common, "scale_temperatures=[1,1,1]")
    assert "the model has 3 groups" in sample.fails(*common, "group_temperatures=[1,1]")


def test_default_folder_is_beside_the_checkpoint_and_repeats_itself(sample, checkpoint):
    sample(f"checkpoint={checkpoint}", "seeds=0-3")
    (folder,) = (checkpoint.parent / "samples").iterdir()
    before = (folder / "grid.png").read_bytes()
    sample(f"checkpoint={checkpoint}", "seeds=0-3", "batch_size=2")
    assert [f.name for f in (checkpoint.parent / "samples").iterdir()] == [folder.name]
    assert (folder / "grid.png").read_bytes() == before


def test_recalibration_is_cached_by_temperature(sample, checkpoint, tmp_path, monkeypatch):
    common = (f"checkpoint={checkpoint}", "seeds=0-3", "recalibrate_bn=2", "bn_batch_size=8",
              "npz=true")  # fmt: skip
    sample(*common, "temperature=[0.5,1.0]", "output=new")
    caches = sorted(f.name for f in tmp_path.glob("*.npz"))
    assert caches == ["model.bn-t0.5-n2x8-seed0.npz", "model.bn-t1-n2x8-seed0.npz"]

    def computed_again(*_args, **_kwargs):
        raise AssertionError("the cache was not used")

    monkeypatch.setattr("nvae.cli.common.recalibrate", computed_again)
    sample(*common, "temperature=0.5", "output=cached")
    new, cached = (np.load(tmp_path / n / "samples.npz")["images"] for n in ("new", "cached"))
    assert np.array_equal(new[0], cached[0])
    sample(f"checkpoint={checkpoint}", "seeds=0-3", "npz=true", "temperature=0.5", "output=plain")
    plain = np.load(tmp_path / "plain" / "samples.npz")["images"]
    assert not np.allclose(plain, cached, atol=1e-3)


@pytest.mark.parametrize(
    ("arguments", "files"),
    [
        (("mode=reconstruct", "images=0-3"), ["reconstructions.png"]),
        (("mode=interpolate", "seeds=0-2", "steps=4", "frames=3"),
         ["interpolation.gif", "interpolation.png"]),
        (("mode=interpolate", "source=images", "images=[5,1]", "frames=0"),
         ["interpolation.png"]),
        (("mode=partial", "source=images", "images=[2,7]", "draws=2"),
         ["partial-image2.png", "partial-image7.png"]),
        (("mode=partial", "seeds=1", "keep=[0,2]"), ["partial-seed1.png"]),
        (("mode=traverse", "seeds=4", "groups=[0,2]", "steps=3"), ["traversal-seed4.png"]),
        (("mode=nearest", "seeds=0-2", "neighbors=3"), ["nearest.npz", "nearest.png"]),
    ],
)  # fmt: skip
def test_every_mode_writes_its_pictures(sample, checkpoint, tmp_path, arguments, files):
    sample(f"checkpoint={checkpoint}", *arguments, "output=out")
    manifest = _manifest(tmp_path / "out")
    assert manifest["files"] == files
    assert manifest["request"]["mode"] == arguments[0].removeprefix("mode=")


def test_arrays_of_partial_and_traverse_are_what_their_sheets_show(sample, checkpoint, tmp_path):
    common = (f"checkpoint={checkpoint}", "npz=true")
    sample(*common, "mode=partial", "seeds=4-5", "keep=[0,3]", "draws=2", "output=partial")
    partial = np.load(tmp_path / "partial" / "samples.npz")
    assert partial["images"].shape == (2, 2, 3, 1, 8, 8)
    assert partial["seeds"].tolist() == [4, 5]
    assert partial["keep"].tolist() == [0, 3]
    assert partial["draw_seeds"].shape == (2, 2)
    # all groups kept: the draws are the original
    assert np.allclose(partial["images"][:, 1, 1:], partial["images"][:, 1, :1], atol=1e-5)
    assert not np.allclose(partial["images"][:, 0, 1:], partial["images"][:, 0, :1], atol=1e-3)
    sample(*common, "mode=traverse", "source=images", "images=[7,2]", "groups=[1]", "steps=4",
           "output=traverse")  # fmt: skip
    traverse = np.load(tmp_path / "traverse" / "samples.npz")
    assert traverse["images"].shape == (2, 1, 4, 1, 8, 8)
    assert traverse["index"].tolist() == [7, 2]
    assert traverse["groups"].tolist() == [1]
    assert "seeds" not in traverse


def test_reconstructions_show_the_images_asked_for(sample, checkpoint, tmp_path):
    from nvae.data.module import ImageDataModule

    from .checkpoints import DATA

    sample(f"checkpoint={checkpoint}", "mode=reconstruct", "images=[9,0]", "npz=true",
           "output=out")  # fmt: skip
    shown = np.load(tmp_path / "out" / "samples.npz")["images"]
    data = ImageDataModule(DATA)
    data.setup()
    everything = np.concatenate([batch.x.numpy() for batch in data.batches("test")])
    assert np.array_equal(shown[:2], everything[[9, 0]])
    assert "allowed: 0 to 11" in sample.fails(
        f"checkpoint={checkpoint}", "mode=reconstruct", "images=12", "output=other"
    )


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"temperature": -0.1}, "0 or more"),
        ({"temperature": float("nan")}, "temperature is nan; it must be a finite number"),
        ({"temperature": "warm"}, "not a number"),
        ({"temperature": []}, "not a number"),
        ({"temperature": True}, "not a number"),
        ({"scale_temperatures": [-1, 1]}, "0 or more"),
        ({"scale_temperatures": [1, 1], "temperature": 0.5}, "takes the place"),
        ({"scale_temperatures": [1, 1], "group_temperatures": [1]}, "exclude each other"),
        ({"pixel_temperature": -1}, "allowed: mean"),
        ({"pixel_temperature": "mode"}, "mean"),
        ({"pixel_temperature": [1]}, "mean"),
        ({"temperature": [0.7, 1, 0.7]}, "names 0.7 twice"),
        ({"scale_temperatures": []}, "scale_temperatures is empty"),
        ({"group_temperatures": []}, "group_temperatures is empty"),
        ({"mode": "partial", "keep": []}, "keep is empty"),
        ({"mode": "traverse", "groups": []}, "groups is empty"),
        ({"seeds": "5-3"}, "runs backwards"),
        ({"seeds": "a-b"}, "no number or range"),
        ({"seeds": [1, 1]}, "twice"),
        ({"seeds": []}, "empty"),
        ({"seeds": 2**63}, "64 bits"),
        ({"seeds": str(2**63)}, "too large"),
        ({"mode": "inpaint"}, "allowed: prior"),
        ({"mode": "interpolate", "temperature": [0.5, 1]}, "one temperature"),
        ({"mode": "reconstruct", "recalibrate_bn": 5}, "fits the prior"),
        ({"mode": "traverse", "compile": True}, "not for mode=traverse"),
        ({"source": "images"}, "mode=prior starts from seeds"),
        ({"mode": "nearest", "source": "images"}, "mode=nearest starts from seeds"),
        ({"mode": "reconstruct", "seeds": 3}, "takes images=..., not seeds"),
        ({"mode": "partial", "source": "images", "seeds": 3}, "takes images=..., not seeds"),
        ({"mode": "reconstruct", "temperature": 0.7}, "temperature changes nothing of mode=reco"),
        ({"mode": "reconstruct", "group_temperatures": [1.0]}, "group_temperatures changes"),
        ({"mode": "reconstruct", "pixel_temperature": 1.0}, "pixel_temperature changes"),
        ({"mode": "traverse", "source": "images", "temperature": 0.7}, "temperature changes"),
        ({"classes": "all", "columns": 3}, "columns and classes exclude each other"),
        ({"mode": "nearest", "columns": 3}, "columns is for mode=prior"),
        ({"full_depth": True, "single_images": False}, "full_depth=true is for single images"),
        ({"mode": "partial", "full_depth": True}, "full_depth=true is for mode=prior"),
        ({"classes": 3, "recalibrate_bn": 5}, "samples without a class"),
        ({"animation": "webm"}, "allowed: gif, mp4"),
        ({"weights": "best"}, "allowed: ema, raw"),
        ({"split": "all"}, "allowed: train"),
        ({"steps": 1}, "at least 2"),
        ({"batch_size": 0}, "at least 1"),
    ],
)
def test_wrong_settings_are_refused(settings, words):
    with pytest.raises(ValueError, match=re.escape(words)):
        SampleConfig("model.ckpt", **settings)


@pytest.mark.parametrize(
    "settings",
    [
        {"mode": "reconstruct", "temperature": [1], "seeds": None, "source": "images"},
        {"mode": "partial", "source": "images", "temperature": 0.7, "pixel_temperature": 0},
        {"mode": "interpolate", "temperature": 0.7, "recalibrate_bn": 5},
        {"classes": 3, "full_depth": True},
    ],
)
def test_settings_that_are_used_are_taken(settings):
    SampleConfig("model.ckpt", **settings)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("temperature=-0.1",), "0 or more"),
        (("mode=interpolate", "seeds=3"), "at least two"),
        (("mode=traverse", "groups=[3]"), "0 (coarsest) to 2"),
        (("mode=partial", "keep=[4]"), "allowed: 0 to 3"),
        (("recalibrate_bn=2", "bn_batch_size=1"), "at least 2"),
        (("temprature=1",), "did you mean temperature?"),
        (("device=cuda:99",), "CUDA device"),
        (("kernels=fast",), "allowed: auto, reference, cuda"),
        (("kernels=cuda", "device=cpu"), "kernels=cuda needs an NVIDIA GPU"),
        (("keep=[a]",), "keep[0]: a is not an integer"),
    ],
)
def test_mistakes_are_one_line_and_write_nothing(sample, checkpoint, tmp_path, arguments, words):
    assert words in sample.fails(f"checkpoint={checkpoint}", *arguments, "output=out")
    assert [f.name for f in tmp_path.iterdir()] == ["model.ckpt"]


@pytest.mark.parametrize(
    "arguments", [("mode=partial", "keep=[0,4]"), ("mode=traverse", "groups=[3]")]
)
def test_groups_that_are_none_are_told_before_anything_is_encoded(
    sample, checkpoint, monkeypatch, arguments
):
    def encoded(*_args, **_kwargs):
        raise AssertionError("encoded all the same")

    monkeypatch.setattr("nvae.cli.sample.encode", encoded)
    assert "allowed: 0" in sample.fails(
        f"checkpoint={checkpoint}", *arguments, "source=images", "images=0-1"
    )


def test_a_folder_is_not_called_by_the_temperatures_of_all_groups(
    sample, checkpoint, tmp_path, monkeypatch
):
    """Of forty groups the name would be longer than file systems take."""
    monkeypatch.setattr("nvae.cli.sample._LONGEST_LABEL", 10)
    common = (f"checkpoint={checkpoint}", "seeds=0", "output=out", "overwrite=true")
    names = set()
    for values in ("0.5,0.6,0.9", "0.5,0.7,0.9"):
        sample(*common, f"group_temperatures=[{values}]")
        names |= {each.name for each in (tmp_path / "out").iterdir() if each.is_dir()}
    assert len(names) == 2
    assert all(re.fullmatch(r"t0\.5-0\.9_[0-9a-f]{8}", name) for name in names)


def test_bad_checkpoints_are_one_line(sample, checkpoint, tmp_path):
    assert "no checkpoint at" in sample.fails("checkpoint=missing.ckpt")
    checkpoint.write_bytes(checkpoint.read_bytes()[:-200])
    sample.fails(f"checkpoint={checkpoint}")
    bare = write_checkpoint(tmp_path / "bare.ckpt", with_data=False)
    assert "give data=NAME" in sample.fails(f"checkpoint={bare}", "mode=reconstruct")
    sample(f"checkpoint={bare}", "seeds=0-1", "output=fine")  # the prior needs no data


def test_a_folder_of_something_else_is_not_touched(sample, checkpoint, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "grid.png").write_text("mine")
    assert "overwrite=true" in sample.fails(f"checkpoint={checkpoint}", "output=out")
    assert (tmp_path / "out" / "grid.png").read_text() == "mine"
    sample(f"checkpoint={checkpoint}", "seeds=0-1", "output=out", "overwrite=true")
    assert "overwrite=true" in sample.fails(f"checkpoint={checkpoint}", "seeds=0-2", "output=out")


def test_pictures_of_two_requests_do_not_mix(tmp_path):
    """Only what the older manifest lists is deleted, and nothing outside of the folder."""

    def write(request, *names):
        folder = SampleFolder(tmp_path / "out", {"of": request}, overwrite=True, view=View())
        for name in names:
            folder.image(name, torch.zeros(1, 4, 4))
        folder.manifest({})

    write(1, "t1/a.png", "t1/b.png", "t2/a.png")
    content = _manifest(tmp_path / "out")
    (tmp_path / "out" / "mine.png").write_text("mine")
    (tmp_path / "other.png").write_text("mine")
    names = [*content["files"], "../other.png", str(tmp_path / "other.png"), "none.png", "\0", 7]
    (tmp_path / "out" / "manifest.json").write_text(json.dumps({**content, "files": names}))
    write(2, "t1/a.png")
    left = sorted(p.relative_to(tmp_path).as_posix() for p in tmp_path.rglob("*") if p.is_file())
    assert left == ["other.png", "out/manifest.json", "out/mine.png", "out/t1/a.png"]
    assert not (tmp_path / "out" / "t2").exists()


@pytest.mark.parametrize("overwrite", ["true", "false"])
def test_a_folder_that_cannot_be_written_is_told_before_sampling(
    sample, checkpoint, monkeypatch, overwrite
):
    def sampled(*_args, **_kwargs):
        raise AssertionError("sampled all the same")

    monkeypatch.setattr("nvae.cli.sample.sample_images", sampled)
    blocked = checkpoint / "a" / "b"  # below a file: root too is refused
    error = sample.fails(f"checkpoint={checkpoint}", f"output={blocked}", f"overwrite={overwrite}")
    assert error == f"error: {blocked} cannot be written: Not a directory; give output=FOLDER\n"


def test_an_interrupted_request_is_finished_by_the_next(
    sample, checkpoint, tmp_path, monkeypatch, capsys
):
    """Killed after the first pictures; another request still finds the folder taken."""

    def killed(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("nvae.cli.sample_folder.SampleFolder.grids", killed)
        with pytest.raises(SystemExit, match="130"):
            sample(f"checkpoint={checkpoint}", "seeds=0-1", "output=out")
    capsys.readouterr()
    assert not json.loads((tmp_path / "out" / "manifest.json").read_text())["complete"]
    assert "overwrite=true" in sample.fails(f"checkpoint={checkpoint}", "seeds=0-2", "output=out")
    sample(f"checkpoint={checkpoint}", "seeds=0-1", "output=out")
    assert _manifest(tmp_path / "out")["complete"]


def test_workers_and_places_do_not_make_another_request(sample, checkpoint, tmp_path):
    request = f"checkpoint={checkpoint}", "mode=reconstruct", "images=0-1", "output=out"
    sample(*request)
    sample(*request, "data.num_workers=0", "data.eval_batch_size=3")


def test_integers_are_read_as_written():
    assert integers("seeds", "3-5") == [3, 4, 5]
    assert integers("seeds", 7) == [7]
    assert integers("seeds", [0, "2-3"]) == [0, 2, 3]
    assert SampleConfig("x").seed_list == list(range(64))
    assert SampleConfig("x", mode="partial").seed_list == list(range(8))

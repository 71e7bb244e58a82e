import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from nvae.checkpoint import (
    CONFIG_FILE,
    WEIGHTS_FILE,
    CheckpointError,
    load_model,
    save_model,
    write_weights,
)
from nvae.export.__main__ import main
from nvae.export.folder import export, model_card
from nvae.export.sampler import Sampler, export_sampler, largest_difference
from nvae.models import NVAE
from nvae.sampling.compiled import load_machine_code
from tests.models.small import small_model

pytest.importorskip("safetensors")


@pytest.fixture(scope="module")
def model() -> NVAE:
    """With batch statistics that differ from a fresh model's."""
    torch.manual_seed(0)
    model = small_model(likelihood="logistic_mixture", num_flows=1)
    model(torch.rand(4, 1, 16, 16))
    return model.eval()


@pytest.fixture(scope="module")
def checkpoint(model: NVAE, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("run") / "model.ckpt"
    data = {"name": "digits", "licence": "CC BY 4.0 | attribution", "train_size": 1397}
    save_model(model, path, run_config={"name": "first", "data": data})
    return path


@pytest.fixture(scope="module")
def exported(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("exports") / "out"
    main([str(checkpoint), "--to", str(folder)])
    return folder


def test_load_model_reads_the_folder(model: NVAE, exported: Path) -> None:
    """Configuration and every tensor survive, in evaluation mode."""
    loaded = load_model(exported)
    assert loaded.config == model.config
    assert not loaded.training
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name


def test_channels_last_weights_are_written(model: NVAE, tmp_path: Path) -> None:
    """A model that trains on a GPU has such weights; safetensors refuses them as they are."""
    write_weights(small_model().to(memory_format=torch.channels_last), tmp_path)
    assert load_model(tmp_path).config == small_model().config


def test_program_of_the_folder_equals_the_model(model: NVAE, exported: Path) -> None:
    """Other noise, batch and temperatures than it was traced with; read back from the file."""
    run = torch.export.load(exported / "sampler.pt2").module()
    for batch, temperature in ((1, 1.0), (5, 0.6)):
        noise = model.draw_noise(batch)
        image = run(noise, torch.full((len(noise),), temperature), [])
        expected = model.likelihood(model.sample_logits(batch, temperature, noise)).mean
        torch.testing.assert_close(image, expected, rtol=0, atol=1e-5)


def test_temperatures_of_single_groups_reach_their_group(model: NVAE, exported: Path) -> None:
    run = torch.export.load(exported / "sampler.pt2").module()
    noise, temperatures = model.draw_noise(2), [0.2, 1.0, 0.5]
    image = run(noise, torch.tensor(temperatures), [])
    expected = model.likelihood(model.sample_logits(2, temperatures, noise)).mean
    torch.testing.assert_close(image, expected, rtol=0, atol=1e-5)


def test_program_runs_without_this_package(exported: Path, tmp_path: Path) -> None:
    """Torch alone is enough: no operator of ours is left, nor a path of the machine."""
    script = (
        "import sys, torch\n"
        "run = torch.export.load(sys.argv[1]).module()\n"
        "noise = [torch.randn(3, 3, s, s) for s in (4, 8, 8)]\n"
        "assert run(noise, torch.ones(3), []).shape == (3, 1, 16, 16)\n"
        "assert not [name for name in sys.modules if name.split('.')[0] == 'nvae']\n"
    )
    program = exported / "sampler.pt2"
    subprocess.run([sys.executable, "-I", "-c", script, program], check=True, cwd=tmp_path)
    assert str(Path(__file__).parent.parent).encode() not in program.read_bytes()


@pytest.mark.parametrize("likelihood", ["bernoulli", "normal", "logistic_mixture"])
def test_drawn_pixels_take_their_noise_as_input(likelihood: str) -> None:
    """The same coins give the model's own sample; other coins another one."""
    small = small_model(likelihood=likelihood, groups_per_scale=1, num_scales=1).eval()
    sampler = Sampler(small, pixel_temperature=0.8)
    program = export_sampler(sampler)
    assert largest_difference(sampler, program.module()) <= 1e-5
    noise, temperature, pixel_noise = sampler.example(2)
    first = program.module()(noise, temperature, pixel_noise)
    other = program.module()(noise, temperature, sampler.example(2, seed=1)[2])
    assert not torch.equal(first, other)


def test_the_program_leaves_the_encoder_out(model: NVAE) -> None:
    before = len(model.state_dict())
    sampler = Sampler(model)
    assert not [name for name in sampler.state_dict() if "encoder" in name]
    assert len(model.state_dict()) == before


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")
def test_compiled_sampler_equals_the_model_without_this_package(
    model: NVAE, checkpoint: Path, tmp_path: Path
) -> None:
    """Machine code of a batch of two, loaded by torch alone."""
    folder = tmp_path / "out"
    main([str(checkpoint), "--to", str(folder), "--compile", "2"])
    noise = model.draw_noise(2)
    temperatures = [0.2, 1.0, 0.5]
    expected = model.likelihood(model.sample_logits(2, temperatures, noise)).mean
    image = load_machine_code(folder / "sampler_compiled.pt2")(
        noise, torch.tensor(temperatures), []
    )
    torch.testing.assert_close(image, expected, rtol=0, atol=1e-5)
    compiled = json.loads((folder / "sampler.json").read_text())["compiled"]
    assert compiled["batch"] == 2
    assert compiled["largest_difference_from_eager"] <= 1e-5
    torch.save((noise, torch.tensor(temperatures), image), tmp_path / "expected.pt")
    script = (
        "import sys, torch\n"
        "run = torch._inductor.aoti_load_package(sys.argv[1])\n"
        "noise, temperature, image = torch.load(sys.argv[2])\n"
        "assert torch.equal(run(noise, temperature, []), image)\n"
        "assert not [name for name in sys.modules if name.split('.')[0] == 'nvae']\n"
    )
    files = folder / "sampler_compiled.pt2", tmp_path / "expected.pt"
    subprocess.run([sys.executable, "-I", "-c", script, *files], check=True, cwd=tmp_path)


@pytest.mark.parametrize("batch", ["0", "-1", "many"])
def test_wrong_batch_to_compile_for(
    batch: str, checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        main([str(checkpoint), "--to", str(tmp_path / "out"), f"--compile={batch}"])
    assert "a number of images, 1 or more" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_description_says_what_the_program_takes(model: NVAE, exported: Path) -> None:
    description = json.loads((exported / "sampler.json").read_text())
    assert description["noise"] == [["B", *shape] for shape in model.latent_shapes]
    assert description["image"] == ["B", 1, 16, 16]
    assert description["largest_difference_from_eager"] <= 1e-5


def test_card_names_network_data_and_licence(model: NVAE, exported: Path) -> None:
    card = (exported / "README.md").read_text()
    parameters = sum(p.numel() for p in model.parameters())
    assert card.startswith("---\nlibrary_name: nvae\n")
    assert f"| {parameters:,} |" in card
    assert "CC BY 4.0 \\| attribution" in card
    assert "does not say" in model_card(model)


def test_a_folder_that_holds_something_is_left_alone(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(SystemExit, match="2"):
        main([str(checkpoint), "--to", str(tmp_path)])
    assert "is not empty" in capsys.readouterr().err
    assert [file.name for file in tmp_path.iterdir()] == ["mine.txt"]


def test_a_failed_export_leaves_nothing(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The folder appears whole or not at all, whichever step fails."""
    monkeypatch.setattr("nvae.export.folder.largest_difference", lambda *_: float("nan"))
    with pytest.raises(ValueError, match="differs from the model"):
        export(checkpoint, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_a_place_that_cannot_be_written_is_one_line(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(SystemExit, match="2"):
        main([str(checkpoint), "--to", str(tmp_path / "file" / "out")])
    assert re.fullmatch(r"error: .*out cannot be written: .*\n", capsys.readouterr().err)


def test_an_empty_folder_that_is_there_is_filled(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Such as the current one, or where a disk is mounted: it cannot be replaced."""
    here = tmp_path / "here"
    here.mkdir()
    (tmp_path / "link").symlink_to(here)
    place = here.stat().st_ino
    monkeypatch.chdir(here)
    for name in (".", str(tmp_path / "link")):
        main([str(checkpoint), "--to", name, "--no-sampler"])
        found = sorted(file.name for file in here.iterdir())
        assert found == ["README.md", "config.json", "model.safetensors"]
        assert here.stat().st_ino == place
        for file in here.iterdir():
            file.unlink()

    def full_disk(file: Path, target: Path) -> Path:
        if file.name == CONFIG_FILE:
            raise OSError(28, "No space left on device")
        return real(file, target)

    real = Path.rename
    monkeypatch.setattr(Path, "rename", full_disk)
    with pytest.raises(OSError, match=r"here cannot be written: .*No space left"):
        export(checkpoint, here, with_sampler=False)
    assert not list(here.iterdir())
    assert sorted(file.name for file in tmp_path.iterdir()) == ["here", "link"]


def test_a_checkpoint_that_cannot_be_read_is_not_the_folders_fault(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    def broken(*_: object, **__: object) -> None:
        raise OSError(5, "Input/output error", str(checkpoint))

    monkeypatch.setattr("nvae.export.folder.load_model", broken)
    with pytest.raises(SystemExit, match="2"):
        main([str(checkpoint), "--to", str(tmp_path / "out")])
    error = capsys.readouterr().err
    assert "model.ckpt" in error
    assert "cannot be written" not in error


def test_missing_checkpoint_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main([str(tmp_path / "none.ckpt"), "--to", str(tmp_path / "out")])
    error = capsys.readouterr().err
    assert error.startswith("error: no checkpoint at")
    assert error.count("\n") == 1


def test_bad_folders_are_one_clear_line(model: NVAE, tmp_path: Path) -> None:
    def fails_with(text: str) -> None:
        with pytest.raises(CheckpointError, match=text) as caught:
            load_model(tmp_path)
        assert "\n" not in str(caught.value)

    fails_with("no checkpoint at")
    write_weights(model, tmp_path)
    weights = (tmp_path / WEIGHTS_FILE).rename(tmp_path / "elsewhere")
    fails_with("has no model.safetensors")
    weights.rename(tmp_path / WEIGHTS_FILE)
    config = json.loads((tmp_path / CONFIG_FILE).read_text())
    (tmp_path / CONFIG_FILE).write_text(json.dumps({**config, "nvae_format": 7}))
    fails_with("nvae_format 7")
    (tmp_path / CONFIG_FILE).write_text(json.dumps({**config, "latent_channels": 5}))
    fails_with("does not describe a usable model")
    (tmp_path / CONFIG_FILE).write_text("{")
    fails_with("is no JSON")
    (tmp_path / CONFIG_FILE).write_text(json.dumps(config))
    (tmp_path / WEIGHTS_FILE).write_bytes(b"\x00" * 5)
    fails_with("is damaged")


def test_hub_round_trip(model: NVAE, exported: Path, tmp_path: Path) -> None:
    """from_pretrained reads an exported folder; save_pretrained's is read by load_model."""
    pytest.importorskip("huggingface_hub")
    from nvae.hub import HubNVAE

    hub_model = HubNVAE.from_pretrained(str(exported))
    assert isinstance(hub_model, HubNVAE)
    assert hub_model.config == model.config
    HubNVAE.of(model).save_pretrained(tmp_path)
    again = load_model(tmp_path)
    noise = model.draw_noise(2)
    expected = model.sample_logits(2, 0.7, noise)
    for loaded in (hub_model, again):
        for name, tensor in model.state_dict().items():
            assert torch.equal(loaded.state_dict()[name], tensor), name
        # load_model's are channels_last, where rounding differs
        loaded.to(memory_format=torch.contiguous_format)
        assert torch.equal(loaded.sample_logits(2, 0.7, noise), expected)
    assert (tmp_path / "README.md").read_text() == model_card(model)


def test_hub_refuses_a_missing_weight(model: NVAE, tmp_path: Path) -> None:
    """The library's default would fill it with random numbers and say nothing."""
    pytest.importorskip("huggingface_hub")
    import safetensors.torch

    from nvae.hub import HubNVAE

    write_weights(model, tmp_path)
    state = safetensors.torch.load_file(tmp_path / WEIGHTS_FILE)
    del state["initial_state"]
    safetensors.torch.save_file(state, tmp_path / WEIGHTS_FILE)
    config = json.loads((tmp_path / CONFIG_FILE).read_text())
    del config["sha256"]  # with it the file is refused anyway
    (tmp_path / CONFIG_FILE).write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="initial_state"):
        HubNVAE.from_pretrained(str(tmp_path))

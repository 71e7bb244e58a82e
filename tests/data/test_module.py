"""The Lightning data module: the right input in every loop, and exact resume of training."""

import atexit
import json

import pytest
import pytorch_lightning as pl
import torch
import torch.distributed as dist

from nvae.data.module import ImageDataModule


class Recorder(pl.LightningModule):
    """A model that remembers what it was given."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.seen = []
        self.evaluated = []

    def training_step(self, batch, batch_idx):
        assert batch.x.dtype == torch.float32
        self.seen.append((batch.index.tolist(), batch.x.double().sum().item()))
        return self.weight * batch.x.mean()

    def validation_step(self, batch, batch_idx):
        self.evaluated += batch.index.tolist()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


class RankRecorder(Recorder):
    """Writes what its rank was given to a file: spawned processes share no memory."""

    def __init__(self, folder):
        super().__init__()
        self.folder = folder

    def on_fit_start(self):
        # Lightning leaves a gloo group to the interpreter's end, where one of its threads that
        # wants Python aborts the process ("terminate called without an active exception")
        atexit.register(dist.destroy_process_group)

    def on_fit_end(self):
        content = {"seen": [index for index, _ in self.seen], "evaluated": self.evaluated}
        (self.folder / f"{self.global_rank}.json").write_text(json.dumps(content))


def trainer(tmp_path, **options):
    defaults = {
        "accelerator": "cpu",
        "devices": 1,
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": False,
        "num_sanity_val_steps": 0,
        "default_root_dir": tmp_path,
    }
    return pl.Trainer(**(defaults | options))


@pytest.fixture(params=["always", "never"])
def module(request, make_config):
    return ImageDataModule(make_config(on_device=request.param, flip=True, bits=5))


def test_on_device_and_memory_mapped_give_the_same_input(make_config):
    def inputs(**overrides):
        module = ImageDataModule(make_config(flip=True, **overrides))
        module.setup()
        batches = [module.to_input(raw) for raw in module.train_dataloader()]
        return [batch.x for batch in batches] + [batch.x for batch in module.batches("test")]

    for a, b in zip(
        inputs(on_device="always"), inputs(on_device="never", num_workers=3), strict=True
    ):
        assert torch.equal(a, b)


def test_loops_of_a_trainer_get_every_image(module, tmp_path):
    model = Recorder()
    trainer(tmp_path, max_epochs=2).fit(model, module)
    assert len(model.seen) == 12
    first = [i for index, _ in model.seen[:6] for i in index]
    second = [i for index, _ in model.seen[6:] for i in index]
    assert len(set(first)) == 48
    assert first != second
    assert model.evaluated == list(range(7)) * 2


@pytest.mark.parametrize("stop_after", [1, 4, 6, 9])
def test_a_resumed_training_sees_what_an_unbroken_one_sees(module, tmp_path, stop_after):
    """Epoch starts, epoch ends and places in between, with flips."""
    whole = Recorder()
    trainer(tmp_path, max_epochs=3).fit(whole, module)

    path = tmp_path / "state.ckpt"

    class Save(pl.Callback):
        def on_train_batch_end(self, trainer, *_):
            if trainer.global_step == stop_after:
                trainer.save_checkpoint(path)

    first = Recorder()
    trainer(tmp_path, max_steps=stop_after, callbacks=[Save()]).fit(
        first, ImageDataModule(module.config)
    )
    second = Recorder()
    trainer(tmp_path, max_epochs=3).fit(
        second, ImageDataModule(module.config), ckpt_path=path, weights_only=True
    )
    assert first.seen + second.seen == whole.seen


def test_resume_after_the_end_of_a_limited_epoch(module, tmp_path):
    """With limit_train_batches an epoch ends before its images do: the next one starts afresh."""
    whole = Recorder()
    trainer(tmp_path, max_epochs=3, limit_train_batches=4).fit(whole, module)
    one = trainer(tmp_path, max_epochs=1, limit_train_batches=4)
    first = Recorder()
    one.fit(first, ImageDataModule(module.config))
    one.save_checkpoint(tmp_path / "end.ckpt")
    second = Recorder()
    trainer(tmp_path, max_epochs=3, limit_train_batches=4).fit(
        second, ImageDataModule(module.config), ckpt_path=tmp_path / "end.ckpt", weights_only=True
    )
    assert first.seen + second.seen == whole.seen


def test_overfitting_repeats_the_same_batches(module, tmp_path):
    """Lightning turns off the shuffling of its own loaders only."""
    model = Recorder()
    trainer(tmp_path, max_epochs=2, overfit_batches=2, limit_val_batches=0).fit(model, module)
    assert model.seen[:2] == model.seen[2:]


@pytest.mark.slow
def test_two_ranks_share_every_global_batch_and_the_evaluation(make_config, tmp_path):
    """As one rank with twice the batch size reads it; no image evaluated twice."""
    alone = Recorder()
    trainer(tmp_path, max_epochs=2).fit(alone, ImageDataModule(make_config(batch_size=8)))
    model = RankRecorder(tmp_path)
    two = {"devices": 2, "strategy": "ddp_spawn", "max_epochs": 2}
    trainer(tmp_path, **two).fit(model, ImageDataModule(make_config(batch_size=4)))
    ranks = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)]
    together = [a + b for a, b in zip(ranks[0]["seen"], ranks[1]["seen"], strict=True)]
    assert together == [index for index, _ in alone.seen]
    assert sorted(ranks[0]["evaluated"] + ranks[1]["evaluated"]) == sorted(alone.evaluated)


def test_validation_falls_back_to_test_images(make_config):
    module = ImageDataModule(make_config(valid_size=0))
    module.setup()
    assert [batch.split for batch in module.val_dataloader()] == ["test", "test"]
    assert len(module.split("valid")) == 5


def test_without_any_evaluation_images_it_stops(make_config):
    module = ImageDataModule(make_config(valid_size=0, test_size=0))
    with pytest.raises(ValueError, match="neither validation nor test"):
        module.setup()


def test_a_fingerprint_is_plain_and_tells_other_data_apart(make_config):
    """It goes into checkpoints; a resume with other images or another order must be seen."""

    def fingerprint(**overrides):
        module = ImageDataModule(make_config(**overrides))
        module.setup()
        return module.fingerprint()

    first = fingerprint()
    assert json.loads(json.dumps(first)) == first == fingerprint(batch_size=3)
    assert {name: split["images"] for name, split in first["splits"].items()} == {
        "train": 50,
        "valid": 7,
        "test": 5,
    }
    others = [fingerprint(seed=1), fingerprint(split_seed=1), fingerprint(train_size=49)]
    assert first not in others


def test_fewer_images_than_a_batch_train_with_what_there_is(make_config, tmp_path, capsys):
    """Ten pictures are a newcomer's first data set."""
    config = make_config(train_size=9, valid_size=1, test_size=0, batch_size=16)
    model = Recorder()
    module = ImageDataModule(config)
    trainer(tmp_path, max_epochs=2).fit(model, module)
    assert [sorted(index) for index, _ in model.seen] == [list(range(9))] * 2
    module.train_dataloader()
    error = capsys.readouterr().err
    assert error.count("note: there are only 9 training images; a step takes 9 of them") == 1
    assert error.count("note") == 1


def test_large_sets_stay_off_the_device(make_config):
    module = ImageDataModule(make_config(on_device="auto", on_device_limit=0))
    module.setup()
    assert next(iter(module.train_dataloader())).images is not None

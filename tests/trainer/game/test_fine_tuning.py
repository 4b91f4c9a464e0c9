from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from fastgan.trainer.config import TrainConfig
from fastgan.trainer.errors import RunFolderError, TrainerError
from fastgan.trainer.export import ExportConfig, export
from fastgan.trainer.loop import Trainer
from fastgan.trainer.start import under_names_of
from fastgan.trainer.use.trained import load_trained


@pytest.fixture(autouse=True)
def bare(monkeypatch):
    monkeypatch.setattr(Trainer, "_summarize", lambda trainer: None)
    monkeypatch.setattr(Trainer, "_draw", lambda trainer: None)


def trained(config: TrainConfig, **changes: object) -> Trainer:
    trainer = Trainer(dataclasses.replace(config, **changes))
    trainer.train()
    return trainer


def equal(first: torch.nn.Module, second: torch.nn.Module) -> bool:
    return all(map(torch.equal, first.state_dict().values(), second.state_dict().values()))


def test_a_run_starts_from_the_average_and_the_discriminator_of_another(config, capsys):
    old = trained(config)
    new = Trainer(dataclasses.replace(config, name="new", seed=5, init_from=config.folder))
    assert equal(new.gan.generator, old.gan.ema.module)
    assert equal(new.gan.ema.module, old.gan.ema.module)
    assert equal(new.gan.discriminator, old.gan.discriminator)
    assert f"starting from {config.folder}: all tensors fit" in capsys.readouterr().out
    new.train()
    assert trained(config, name="new", seed=5, init_from=config.folder, resume=True, steps=8).step == 8


def test_an_exported_generator_is_a_start_too_and_layers_that_do_not_fit_are_named(config, capsys):
    pytest.importorskip("safetensors", reason="needs fastgan[export]")
    old = trained(config)
    path = export(ExportConfig(config.folder))
    model = dataclasses.replace(config.model, latent_dim=12)
    new = Trainer(dataclasses.replace(config, name="new", model=model, init_from=path))
    output = capsys.readouterr().out
    assert f"starting from {path} as far as tensors fit (latent_dim was 8 and is 12); these do not:" in output
    assert "generator.0.weight: (256, 8) became (256, 12)" in output
    assert "the file has no discriminator: its weights are new" in output
    assert torch.equal(new.gan.generator.state_dict()["4.weight"], old.gan.ema.module.state_dict()["4.weight"])


def test_a_generator_with_labels_is_a_start_for_one_without_and_the_other_way_round():
    """Labels move the generator's names below `generator.`; only its first layer has another shape."""
    plain = {"0.weight": torch.zeros(4, 2), "4.weight": torch.ones(3, 3)}
    labeled = {"embedding.weight": torch.zeros(5, 2)} | {f"generator.{name}": value for name, value in plain.items()}
    assert under_names_of(plain, labeled).keys() == {"embedding.weight", *plain}
    assert under_names_of(labeled, plain).keys() == labeled.keys() - {"embedding.weight"}
    assert under_names_of(plain, plain) is plain
    assert under_names_of(labeled, labeled) is labeled


def test_a_start_from_which_nothing_fits_is_refused(config):
    trained(config)
    model = dataclasses.replace(config.model, width=5)
    with pytest.raises(ValueError, match=r"no weights of .* fit these networks: width was 4 and is 5"):
        Trainer(dataclasses.replace(config, name="new", model=model, init_from=config.folder))
    assert not (config.runs / "new").exists()


def test_a_run_that_is_not_there_is_an_error_and_leaves_nothing(config):
    with pytest.raises(RuntimeError, match="nowhere does not contain a run"):
        Trainer(dataclasses.replace(config, init_from=Path("nowhere")))
    assert not config.folder.exists()


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("no.pt", "no.pt cannot be read: No such file"),
        ("no.safetensors", "no.safetensors cannot be read: No such file"),
        ("weights.pt", r"weights.pt is not in a run's folder: a checkpoint is RUN/checkpoints"),
    ],
)
def test_a_file_that_is_no_checkpoint_of_a_run_is_named(config, in_tmp_path, name, says):
    Path("weights.pt").write_bytes(b"weights")
    with pytest.raises(TrainerError, match=says):
        Trainer(dataclasses.replace(config, init_from=Path(name)))


def test_a_checkpoint_is_found_from_its_own_folder(config, monkeypatch):
    trained(config)
    monkeypatch.chdir(config.folder / "checkpoints")
    assert load_trained(Path("step-00000006.pt"), torch.device("cpu")).step == 6


def test_a_run_that_was_stopped_before_its_first_checkpoint_starts_from_the_same_weights(config):
    trained(config)
    new = dataclasses.replace(config, name="new", seed=5, init_from=config.folder)
    whole = trained(dataclasses.replace(new, name="whole"))
    Trainer(new).run.lock.release()  # it is stopped here
    resumed = trained(new, resume=True)
    assert equal(resumed.gan.generator, whole.gan.generator)
    assert equal(resumed.gan.discriminator, whole.gan.discriminator)
    with pytest.raises(RunFolderError, match=r"cannot resume .* with different settings"):
        Trainer(dataclasses.replace(new, resume=True, init_from=Path("other")))


@pytest.mark.parametrize("penalty", ["none", "r1", "wgan-gp"])
def test_frozen_layers_keep_their_weights_and_the_others_learn(config, penalty):
    optim = dataclasses.replace(config.optim, freeze_d=2, penalty=penalty)
    trainer = Trainer(dataclasses.replace(config, optim=optim, name="frozen"))
    before = {name: p.detach().clone() for name, p in trainer.gan.discriminator.named_parameters()}
    trainer.train()
    changed = {name for name, p in trainer.gan.discriminator.named_parameters() if not torch.equal(p, before[name])}
    frozen = {name for name in before if name.startswith(("features.0.", "features.2."))}
    assert len(frozen) == 4
    # The gradients of the last bias cancel in a hinge loss whose samples are all inside the margin.
    assert changed | {"head.linear.bias"} == before.keys() - frozen


def test_more_frozen_layers_than_there_are_is_an_error(config):
    with pytest.raises(ValueError, match="freeze_d must be at most 3"):
        Trainer(dataclasses.replace(config, optim=dataclasses.replace(config.optim, freeze_d=9)))

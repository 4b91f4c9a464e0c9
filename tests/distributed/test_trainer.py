"""Two ranks train as one rank with the whole batch."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fastgan.trainer.config import ModelConfig, OptimConfig
from fastgan.trainer.data.sources import load_source
from fastgan.trainer.gan import GAN
from fastgan.trainer.ranks import Ranks

CPU = torch.device("cpu")
IMAGES = ModelConfig(width=4, latent_dim=4, spectral_norm="fused")
POINTS = ModelConfig(width=8, latent_dim=4, spectral_norm="fused", minibatch="discrimination")
RESIDUAL = dataclasses.replace(IMAGES, architecture="residual", spectral_norm="none", minibatch="stddev")
CASES = {
    "batch norm, WGAN-GP": ("waveforms", IMAGES, OptimConfig(batch_size=8, penalty="wgan-gp", loss="wasserstein")),
    "stddev, R1 + R2": ("discs", RESIDUAL, OptimConfig(batch_size=8, penalty="r1+r2", loss="relativistic")),
    "discrimination, R1": ("ring8", POINTS, OptimConfig(batch_size=12, penalty="r1", loss="non-saturating")),
    # Without spectral norm, which iterates once for each part.
    "parts": (
        "ring8",
        dataclasses.replace(POINTS, spectral_norm="none", minibatch="none"),
        OptimConfig(batch_size=12, penalty="wgan-lp"),
    ),
    "a pack": ("ring8", dataclasses.replace(POINTS, pack=2, minibatch="none"), OptimConfig(batch_size=12)),
}


def play(case: str, ranks: Ranks | None = None, **changes: object) -> list[torch.Tensor]:
    """The weights and buffers of both players after two steps in float64."""
    dataset, model, optim = CASES[case]
    gan = GAN(model, dataclasses.replace(optim, **changes), load_source(dataset, 2, CPU), 0, CPU, ranks)
    gan.generator.double(), gan.discriminator.double()
    for _ in range(2):
        gan.discriminator_step(gan.batch().to(torch.float64))
        gan.generator_step(gan.generator_batch().to(torch.float64))
    return [*gan.generator.state_dict().values(), *gan.discriminator.state_dict().values()]


def work(folder: Path) -> None:
    """The script that torchrun starts twice."""
    from fastgan import cli

    torch.set_num_threads(1)
    ranks = Ranks.here(CPU)
    assert ranks.size == 2
    torch.save({case: play(case, ranks) for case in CASES}, folder / f"{ranks.rank}.pt")
    flags = "--steps 4 --width 8 --batch-size 16 --log-every 2 --equilibrium-every 2 --checkpoint-every 2 --device cpu"
    run = ["train", "ring8", "--runs", str(folder / "runs"), *flags.split(), "--minibatch", "stddev"]
    assert cli.main(run) == 0
    ranks.wait()  # until the first rank has written everything, as if the processes had ended
    assert cli.main([*run, "--steps", "6", "--resume"]) == 0


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("ranks")
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [sys.executable, *torchrun, __file__, str(folder)],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[2],
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-12000:]
    return folder


@pytest.mark.parametrize("case", CASES)
def test_two_ranks_reach_the_weights_of_one_rank_with_the_whole_batch(case, folder):
    wanted = play(case)
    for rank in (0, 1):
        got = torch.load(folder / f"{rank}.pt")[case]
        assert len(got) == len(wanted)
        for tensor, reference in zip(got, wanted, strict=True):
            assert torch.allclose(tensor.double(), reference.double(), rtol=1e-6, atol=1e-9)


def test_one_of_two_ranks_keeps_the_run_and_both_resume(folder):
    records = [json.loads(line) for line in (folder / "runs" / "ring8" / "metrics.jsonl").read_text().splitlines()]
    assert [r["step"] for r in records if "d_loss" in r] == [2, 4, 6]
    assert len([r for r in records if "config" in r]) == 2
    assert [path.name for path in sorted((folder / "runs" / "ring8" / "checkpoints").iterdir())] == [
        "step-00000004.pt",
        "step-00000006.pt",
    ]


def test_a_batch_in_parts_gives_the_gradient_of_the_whole():
    wanted, got = play("parts"), play("parts", accumulate=3)
    assert all(torch.allclose(a, b, rtol=1e-6, atol=1e-9) for a, b in zip(got, wanted, strict=True))


def test_a_batch_that_does_not_divide_is_refused():
    with pytest.raises(ValueError, match="multiple of ranks"):
        play("a pack", accumulate=4)


if __name__ == "__main__":
    work(Path(sys.argv[1]))

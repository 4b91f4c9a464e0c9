from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fastgan import cli, ops
from fastgan.ops.attention import blocks_second
from fastgan.trainer.verify import matrix
from fastgan.trainer.verify.lockstep import TOLERANCES
from fastgan.trainer.verify.matrix import LOSSES, NETWORKS, PENALTIES, STATISTICS, Game, compare, games

CPU = torch.device("cpu")


@pytest.mark.parametrize("quick", [True, False])
def test_every_loss_penalty_statistic_and_network_occurs_on_points_and_on_images(quick):
    rows = list(games(quick))
    for points in (True, False):
        part = [game for game in rows if (game.dataset == "ring8") == points]
        assert {game.loss for game in part} == set(LOSSES)
        assert {game.penalty for game in part} == set(PENALTIES)
        assert {game.minibatch for game in part} == set(STATISTICS)
    assert {(game.architecture, game.dataset) for game in rows} == set(NETWORKS)
    pairs = {(game.penalty, game.minibatch) for game in rows}
    assert len(pairs) == len(PENALTIES) * len(STATISTICS)


FEW = [
    Game("mlp", "ring8", "relativistic", "r1+r2", "discrimination", 1),
    Game("pacgan", "ring8", "non-saturating", "wgan-gp", "stddev", 2),
    Game("dcgan", "voxels", "least-squares", "r1", "none", 1),
]
ATTENTION = Game("sagan", "discs", "hinge", "r1", "none", 1)


def test_the_matrix_passes_and_says_so(monkeypatch, capsys):
    monkeypatch.setattr(matrix, "games", lambda quick: FEW)
    assert cli.main(["verify", "--matrix", "--quick", "--device", "cpu"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 + len(FEW)
    assert lines[-1].startswith("PASS: 3 of 3 games, 1 step(s)")


def test_a_statistic_with_a_wrong_gradient_fails_its_rows_and_no_others(monkeypatch, capsys):
    correct = ops.minibatch_stddev

    def broken(x: Tensor, **keywords: object) -> Tensor:
        y = correct(x, **keywords)
        from fastgan import backends

        off = 0 if backends.select("minibatch_stddev", x.device, x.dtype) == "reference" else 1e-3
        return y + off * (y - y.detach())

    monkeypatch.setattr(ops, "minibatch_stddev", broken)
    monkeypatch.setattr(matrix, "games", lambda quick: FEW)
    assert cli.main(["verify", "--matrix", "--quick", "--device", "cpu"]) == 1
    output = capsys.readouterr().out
    assert "FAIL: 2 of 3 games" in output
    assert [line.split()[4] for line in output.splitlines() if line.endswith("FAIL")] == ["stddev"]


def test_attention_keeps_to_the_tolerances_and_a_wrong_second_derivative_does_not(monkeypatch):
    for dtype in TOLERANCES:
        assert compare(ATTENTION, CPU, 1, dtype).breaches() == []
    correct = blocks_second.double_backward

    def broken(*arguments: object) -> None:
        correct(*arguments)
        by_q = arguments[13]
        by_q.mul_(1.01)

    monkeypatch.setattr(blocks_second, "double_backward", broken)
    breaches = compare(ATTENTION, CPU, 1, torch.float64).breaches()
    assert any(".query." in breach for breach in breaches)


def test_a_lenient_tolerance_is_only_for_what_pytorch_itself_cannot_compute():
    game = Game("mlp", "ring8", "hinge", "none", "none", 1)
    errors = compare(game, CPU, 1, torch.float32)
    assert set(errors.own) == set(errors.worst) == {"loss", "gradient", "uv", "update"}
    assert errors.tolerance("gradient") == pytest.approx(1e-4)
    errors.own["gradient"] = 1e-3
    assert errors.tolerance("gradient") == pytest.approx(4e-3)

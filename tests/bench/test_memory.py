from __future__ import annotations

import torch

from fastgan.bench.memory import peak_bytes, saved_bytes

CPU = torch.device("cpu")
X = torch.randn(1000)


def test_the_peak_is_what_lives_at_one_time_and_not_what_was_made_in_all():
    def run():
        for _ in range(5):
            y = X + 1
            y = y.view(10, 100) * 2  # while both live: two; the view is no memory of its own
            del y

    assert peak_bytes(run, CPU) == 2 * X.nbytes
    assert peak_bytes(lambda: X.view(10, 100).t(), CPU) == 0
    assert peak_bytes(lambda: X.mul_(1), CPU) == 0


def test_what_a_node_holds_counts_until_the_node_goes():
    w = torch.randn(1000, requires_grad=True)

    def run():
        y = ((w * X).exp() * X).sum()  # kept: the exponential; passing: one product at a time
        y.backward()

    assert peak_bytes(run, CPU) >= 2 * X.nbytes
    held = saved_bytes(run, [w, X])
    assert held == X.nbytes
    assert saved_bytes(run) == 2 * X.nbytes  # X was there anyway


def test_saved_memory_is_counted_once_and_only_while_it_is_held():
    w = torch.randn(1000, requires_grad=True)

    def run():
        for _ in range(3):
            y = w.exp()
            (y * y).sum().backward()

    assert saved_bytes(run, [w]) == X.nbytes


def test_zeros_that_are_not_stored_count_nothing():
    w = X.clone().requires_grad_()

    def run():
        (grad,) = torch.autograd.grad(w.abs().sum(), w, create_graph=True)  # its derivative is made of such zeros
        torch.autograd.grad((grad * w).sum(), w)

    assert peak_bytes(run, CPU) <= 6 * X.nbytes
    assert saved_bytes(run) > 0

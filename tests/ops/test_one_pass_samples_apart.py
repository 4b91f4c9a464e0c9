"""Discriminators that take samples apart, reorder them and put them together again: exact, and in one pass."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

import fastgan
from tests.ops import one_pass_problem
from tests.ops.one_pass_problem import (
    Between,
    C,
    N,
    S,
    Y,
    assert_at_the_floor,
    assert_exact,
    constant,
    images,
    parameter,
    uneven,
)

MASK = torch.tensor([True, False, False, True])
ORDER = torch.tensor([2, 0, 3, 1])


def zeros(*shape):
    return torch.zeros(*shape, dtype=torch.float64)


def layer(net, h):
    return F.leaky_relu(F.conv2d(h, net.w, net.b, padding=1), 0.2)


def other_layer(net, h):
    return F.relu(F.conv2d(h, net.v, net.b, padding=1)) + net.p


def in_a_loop(join):
    return lambda net, h: join([layer(net, h[i : i + 1]) * (i + 1) + net.p for i in range(len(h))])


def of_single_samples(net, h):
    return torch.stack([layer(net, image) + net.p[0] for image in h])


def with_means(net, h):
    return h + torch.stack([image.mean() + 1 for image in h])[:, None, None, None]


def into_a_buffer(buffer):
    def between(net, h):
        made = buffer(net, h)
        for i, image in enumerate(h):
            made[i] = layer(net, image)
        return made

    return between


def by_index_copy(net, h):
    made = torch.ones_like(h)
    for i in range(len(h)):
        made.index_copy_(0, torch.tensor([i]), layer(net, h[i : i + 1]))
    return made


def parts_of_a_buffer(net, h):
    made = constant(N, C, S, S)
    for i in range(len(h)):
        made[i, :, 1:3] = layer(net, h[i])[:, 1:3]
    return made


def scaled_in_place(net, h):
    made = h * 1.5
    for i in range(len(h)):
        made[i] = made[i] * (i + 1)
        made[i] += net.p[0]
    return made


def phase_shuffle(net, h):
    """Shift each sample by a number of its own and reflect at the border, as WaveGAN does."""
    h = h.flatten(2)
    made = h.clone()
    for shift, samples in {-2: [1], -1: [], 0: [2], 1: [0, 3]}.items():
        if shift > 0:
            made[samples] = F.pad(h[samples][..., :-shift], (shift, 0), mode="reflect")
        elif shift < 0 and samples:
            made[samples] = F.pad(h[samples][..., -shift:], (0, -shift), mode="reflect")
    return made.view(N, C, S, S)


def rolled_apart(net, h):
    return torch.stack([image.roll(shift, -1) for image, shift in zip(h, (1, 0, 3, 2), strict=True)])


def halves(net, h):
    first, second = h.chunk(2)
    return torch.cat([layer(net, first), other_layer(net, second)])


def each_class(net, h):
    """A layer for each class."""
    made = torch.empty_like(h)
    for k in range(3):
        made[k == Y] = F.leaky_relu(F.conv2d(h[k == Y], net.w * (k + 1), net.b, padding=1), 0.2)
    return made


def each_class_by_index(net, h):
    made = zeros(*h.shape)
    for k in Y.unique():
        (where,) = torch.nonzero(k == Y, as_tuple=True)
        made = made.index_copy(0, where, layer(net, h[where]) + k)
    return made


def each_class_by_index_put(net, h):
    made = layer(net, h)
    return made.index_put((MASK.nonzero()[:, 0],), other_layer(net, h[MASK]))


def there_and_back(net, h):
    return layer(net, h[ORDER])[ORDER.argsort()]


def swapped(net, h):
    made = h * 1.5
    made[0], made[1] = h[1], h[0]
    return made


def beside_constants(net, h):
    return layer(net, torch.cat([h, net.p.expand(2, C, S, S), h]))[:N]


def between_constants(net, h):
    made = constant(2 * N, C, S, S)
    made[::2] = h
    return layer(net, made)[::2]


def pooled_nodes(net, h):
    """Sum the pixels of each sample by a vector of sample numbers, as graph networks do."""
    nodes = h.permute(0, 2, 3, 1).reshape(-1, C)
    of_sample = torch.arange(N).repeat_interleave(S * S)
    return zeros(N, C).index_add_(0, of_sample, F.relu(nodes @ constant(C, C)))


def pooled_shuffled_nodes(net, h):
    nodes = h.permute(2, 3, 0, 1).reshape(-1, C)  # the samples lie along an inner dimension
    torch.manual_seed(5)
    order = torch.randperm(len(nodes))
    of_sample = (torch.arange(N).repeat(S * S))[order]
    return constant(N, C).index_add(0, of_sample, nodes[order] + net.p.flatten()[:C])


def messages(net, h):
    """Pass messages along the edges of a graph of pixels."""
    nodes = h.permute(0, 2, 3, 1).reshape(-1, C)
    torch.manual_seed(6)
    edges = torch.cat(
        [torch.stack([torch.randint(S * S, (30,)), torch.randint(S * S, (30,))]) + i * S * S for i in range(N)], 1
    )
    edges = edges[:, torch.randperm(edges.shape[1])]
    sent = F.relu(nodes[edges[0]] @ constant(C, C) + net.p.flatten()[:C])
    heard = torch.zeros_like(nodes).scatter_add_(0, edges[1][:, None].expand_as(sent), sent)
    return F.leaky_relu(heard + nodes, 0.2).view(N, S, S, C).permute(0, 3, 1, 2)


def weights_of_each_sample(net, h):
    order = h[ORDER]
    return F.conv2d(order.reshape(1, N * C, S, S), constant(N * C, C, 3, 3), padding=1, groups=N).view(N, C, S, S)


APART = {
    "slices in a loop": in_a_loop(torch.cat),
    "slices in a loop, backwards": in_a_loop(lambda parts: torch.cat(parts[::-1])),
    "single samples": of_single_samples,
    "scalars of single samples": with_means,
    "split": lambda net, h: torch.cat([layer(net, part) for part in h.split([1, 2, 1])]),
    "split along another dimension": lambda net, h: torch.cat(
        [layer(net, image[None])[:, :, :, None] for image in h.unbind()], dim=3
    ).permute(0, 3, 1, 2, 4)[0],
    "into zeros": into_a_buffer(lambda net, h: zeros(N, C, S, S)),
    "into memory that is not set": into_a_buffer(lambda net, h: torch.empty_like(h)),
    "over features": into_a_buffer(lambda net, h: h * 2 + 1),
    "into zeros by index_copy_": by_index_copy,
    "into parts of constant rows": parts_of_a_buffer,
    "a constant for a sample": lambda net, h: layer(net, torch.cat([h[:3], net.p])),
    "constants between": lambda net, h: layer(net, torch.stack([h, net.p.expand_as(h)], 1).flatten(0, 1))[::2],
    "in place, one after another": scaled_in_place,
    "phase shuffle": phase_shuffle,
    "rolled by numbers of their own": rolled_apart,
    "halves": halves,
    "a layer for each class": each_class,
    "a layer for each class, by index_copy": each_class_by_index,
    "a layer for some, by index_put": each_class_by_index_put,
    "ordered and back": there_and_back,
    "ordered": lambda net, h: layer(net, h[ORDER.tolist()]),
    "ordered by index_select": lambda net, h: layer(net, h.index_select(0, ORDER)),
    "ordered in a grid": lambda net, h: h[
        ORDER.view(N, 1, 1).expand(N, C, S), torch.arange(C).view(C, 1), torch.arange(S)
    ],
    "ordered rows": lambda net, h: layer(
        net, h.flatten(0, 1)[(ORDER[:, None] * C + torch.arange(C)).flatten()].view_as(h)
    ),
    "flipped": lambda net, h: layer(net, h.flip(0, 3)),
    "flipud": lambda net, h: layer(net, torch.flipud(h)),
    "rolled": lambda net, h: layer(net, h.roll((1, 2), (0, 2)) + net.p),
    "a permutation put": lambda net, h: h.index_put((torch.arange(N),), h.flip(0)),
    "swapped": swapped,
    "by a mask": lambda net, h: torch.cat([layer(net, h[MASK]), other_layer(net, h[~MASK])]),
    "stacked upon": lambda net, h: torch.vstack([h[2:], h[:2]]),
    "ordered and repeated": lambda net, h: layer(net, h[ORDER].repeat(2, 1, 1, 1))[N:],
    "ordered, each repeated": lambda net, h: layer(net, h[ORDER].repeat_interleave(2, 0))[::2],
    "ordered copies": lambda net, h: layer(net, torch.cat([h[ORDER], h[ORDER]]))[N:],
    "beside constant rows": beside_constants,
    "between constant rows": between_constants,
    "a constant over one sample": lambda net, h: layer(net, torch.cat([h[:1] * 0 + net.p, h[1:]])),
    "nodes of graphs": pooled_nodes,
    "nodes of graphs in any order": pooled_shuffled_nodes,
    "messages": messages,
    "weights for each sample": weights_of_each_sample,
}  # fmt: skip


def build(name):
    return Between(
        APART[name],
        w=parameter(C, C, 3, 3),
        v=parameter(C, C, 3, 3),
        b=parameter(C),
        p=parameter(1, C, S, S),
    )


@pytest.mark.parametrize("name", APART)
def test_samples_taken_apart_are_exact_and_one_pass(name):
    model = build(name)
    assert fastgan.explain_penalty(model, images()) == "one pass"
    assert_exact(model, images(), uneven)


@pytest.mark.parametrize("name", APART)
def test_sizes_that_agree_do_not_change_this(name, monkeypatch):
    for size in ("C", "S"):
        monkeypatch.setattr(f"{__name__}.{size}", N)
        monkeypatch.setattr(one_pass_problem, size, N)
    model = build(name)
    assert_exact(model, images(), uneven)
    assert fastgan.explain_penalty(model, images()) == "one pass"


@pytest.mark.parametrize("name", ["single samples", "phase shuffle", "halves", "a layer for each class", "messages"])
def test_samples_taken_apart_cost_four_forwards(name):
    assert_at_the_floor(build(name), images())


# Functions of single samples, (C, S, S) or (C, S * S), without a dimension for the batch.
OF_SINGLE = {
    "conv1d": lambda i: F.conv1d(i.flatten(1), constant(4, C, 3), constant(4), padding="same"),
    "conv2d": lambda i: F.conv2d(i, constant(4, C, 2, 2), constant(4), padding="same"),
    "conv3d": lambda i: F.conv3d(i[None], constant(4, 1, 3, 3, 3), constant(4)),
    "conv_transpose1d": lambda i: F.conv_transpose1d(i.flatten(1), constant(C, 4, 3), constant(4), stride=2),
    "conv_transpose2d": lambda i: F.conv_transpose2d(i, constant(C, 4, 3, 3), constant(4), stride=2),
    "linear": lambda i: F.linear(i.flatten(), constant(3, C * S * S), constant(3)),
    "matrix and vector": lambda i: constant(3, C * S * S) @ i.flatten(),
    "avg_pool1d": lambda i: F.avg_pool1d(i.flatten(1), 2),
    "avg_pool2d": lambda i: F.avg_pool2d(i, 2),
    "avg_pool3d": lambda i: F.avg_pool3d(i[None], 2),
    "max_pool1d": lambda i: F.max_pool1d(i.flatten(1), 2),
    "max_pool2d": lambda i: F.max_pool2d(i, 2),
    "adaptive_max_pool2d": lambda i: F.adaptive_max_pool2d(i, 2),
    "adaptive_avg_pool2d": lambda i: F.adaptive_avg_pool2d(i, 2),
    "reflected": lambda i: F.pad(i, (1, 1, 1, 1), "reflect"),
    "replicated": lambda i: F.pad(i.flatten(1), (1, 1), "replicate"),
    "padded": lambda i: F.pad(i, (1, 1, 1, 1), value=0.3),
    "interpolated": lambda i: F.interpolate(i[None], scale_factor=2, mode="bilinear")[0],
    "prelu": lambda i: F.prelu(i, constant(1).abs()),
    "batch norm": lambda i: F.batch_norm(i[None], constant(C), constant(C).abs(), constant(C), constant(C))[0],
    "maxout": lambda i: i.view(2, C // 2, S, S).amax(0),
    "topk": lambda i: i.flatten().topk(5).values,
    "spectrum": lambda i: torch.fft.rfft2(i).real,
    "grid_sample": lambda i: F.grid_sample(i[None], constant(1, S, S, 2).clamp(-1, 1), align_corners=False)[0],
    "dropout": lambda i: F.dropout(i, 0.5),
}


@pytest.mark.parametrize("batch", [N, 1])
@pytest.mark.parametrize("name", OF_SINGLE)
def test_functions_of_single_samples_are_exact_in_one_pass(name, batch):
    model = Between(lambda net, h: torch.stack([OF_SINGLE[name](image) * 1.1 + i for i, image in enumerate(h)]))
    torch.manual_seed(3)
    assert fastgan.explain_penalty(model, images(batch)) == "one pass"
    assert_exact(model, images(batch), uneven)


# Layers that run on no samples where a class does not occur in the batch.
ABSENT = {
    "sum": lambda net, h: h * 2 + net.p,
    "convolution": layer,
    "linear": lambda net, h: F.linear(h, net.w[0, 0].repeat(3, 3)[:S, :S], net.p[0, 0, 0]),
    "average pooling": lambda net, h: F.interpolate(F.avg_pool2d(h, 2), scale_factor=2) + net.p,
    "max pooling": lambda net, h: F.interpolate(F.max_pool2d(h, 2), scale_factor=2) + net.p,
    "leaky ReLU": lambda net, h: F.leaky_relu(h + net.p, 0.2),
}


@pytest.mark.parametrize("name", ABSENT)
def test_a_class_may_be_absent(name):
    def between(net, h):
        made = torch.empty_like(h)
        for k in range(3):
            made[k == ORDER % 2] = ABSENT[name](net, h[k == ORDER % 2]) * (k + 1)
        return made

    model = Between(between, w=parameter(C, C, 3, 3), b=parameter(C), p=parameter(1, C, S, S))
    assert fastgan.explain_penalty(model, images()) == "one pass"
    assert_exact(model, images(), uneven)


ONE = ["slices in a loop", "single samples", "into zeros", "scalars of single samples"]


@pytest.mark.parametrize("name", ONE)
def test_a_batch_of_one_is_exact(name, monkeypatch):
    model = build(name)
    for module in (f"{__name__}.N", "tests.ops.one_pass_problem.N"):
        monkeypatch.setattr(module, 1)
    assert fastgan.explain_penalty(model, images(1)) == "one pass"
    assert_exact(model, images(1), uneven)


def twice(net, h):
    made = zeros(N, C, S, S)
    made[0] = h[0]
    made[0] = made[0] + h[1]
    made[1:] = h[1:]
    return made


def constants_that_gain_an_owner(net, h):
    made = constant(N + 1, C, S, S)
    made[:2] = h[:2]
    made[2:N, :3] = h[2:, :3]  # the rest of these rows is a constant that had no owner
    return made[:N]


def over_a_view(net, h):
    made = h * 1.5
    part = made[:, :2]
    part[0] = h[1, :2]  # the rest of made[0] still belongs to the first sample
    return made


def copied_into_a_sample(net, h):
    made = h * 1.5
    made[0].copy_(h[1])
    return made


MIXED = {
    "another sample through a view": (over_a_view, "through a view"),
    "another sample copied over a view": (copied_into_a_sample, "through a view"),
    "a sample added to another": (twice, "add"),
    "rows of constants that are written in part": (constants_that_gain_an_owner, "setitem"),
    "a sample left out": (lambda net, h: h[torch.tensor([0, 0, 1, 2])], "some samples have more logits"),
    "halves added": (lambda net, h: torch.cat([h[:2] + h[2:], h[2:]]), "add"),
    "samples added together": (
        lambda net, h: zeros(N, S, S, C).transpose(1, 3).index_add(0, torch.tensor([0, 0, 1, 2]), h),
        "index_add",
    ),
    "rows twice": (lambda net, h: h.index_put((torch.tensor([0, 0]),), h[[0, 0]]), "index_put"),
}


@pytest.mark.parametrize("name", MIXED)
def test_mixed_samples_are_refused_by_name_and_exact(name):
    between, reason = MIXED[name]
    model = Between(between)
    said = fastgan.explain_penalty(model, images())
    assert said.startswith("general path: ")
    assert reason in said
    assert_exact(model, images(), uneven)

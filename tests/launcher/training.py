"""Functions that train like scripts of each kind, and yield the results of each step."""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace

import torch
from torch import nn
from torch.nn import functional as F

STEPS = 14
MAKERS = {}


def script(function):
    """A function that trains, and yields the results of each step."""
    MAKERS[function.__name__] = function
    return function


class Discriminator(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding=1)
        self.second = nn.Conv2d(8, 8, 3, stride=2)
        self.last = nn.Linear(8, 1)

    def features(self, x):
        return F.leaky_relu(self.second(F.leaky_relu(self.first(x), 0.2)), 0.2)

    def forward(self, x):
        return self.last(self.features(x).mean((2, 3)))


def penalty(discriminator, x):
    (grad,) = torch.autograd.grad(discriminator(x).sum(), x, create_graph=True)
    return (grad.flatten(1).norm(dim=1) - 1).square().mean()


def data():
    return torch.randn(4, 3, 8, 8), torch.randn(4, 5)


def models():
    return Discriminator(), nn.Sequential(nn.Linear(5, 3 * 64), nn.Unflatten(1, (3, 8, 8)))


@script
def wgan_gp(d, g, steps):
    d_optimizer, g_optimizer = torch.optim.Adam(d.parameters(), 1e-3), torch.optim.Adam(g.parameters(), 1e-3)
    for _ in range(steps):
        real, z = data()
        fake = g(z).detach()
        x = (real + torch.rand(4, 1, 1, 1) * (fake - real)).requires_grad_()
        loss = d(fake).mean() - d(real).mean() + 10 * penalty(d, x)
        d_optimizer.zero_grad()
        loss.backward()
        yield loss, d
        d_optimizer.step()
        g_optimizer.zero_grad()
        g_loss = -d(g(z)).mean()
        g_loss.backward()
        g_optimizer.step()


@script
def a_backward_and_a_step_of_its_own(d, g, steps):
    optimizer = torch.optim.SGD(d.parameters(), 1e-2, momentum=0.9)
    for number in range(steps):
        real, z = data()
        optimizer.zero_grad()
        loss = F.softplus(d(g(z).detach())).mean() + F.softplus(-d(real)).mean()
        loss.backward()
        optimizer.step()
        if number % 2 == 0:
            optimizer.zero_grad()
            x = real.detach().requires_grad_()
            r1 = penalty(d, x)
            r1.backward()
            yield r1, d
            optimizer.step()


@script
def a_bias_without_a_gradient_in_the_penalty_and_with_zeros_in_the_loss(d, g, steps):
    """Weight decay moves the last bias only in the steps of the loss."""
    optimizer = torch.optim.SGD(d.parameters(), 1e-2, momentum=0.9, weight_decay=0.1)
    for _ in range(steps):
        real, z = data()
        optimizer.zero_grad()
        (d(g(z).detach()).mean() - d(real).mean()).backward()
        optimizer.step()
        yield d.last.bias.detach().clone(), d
        optimizer.zero_grad()
        penalty(d, real.requires_grad_()).backward()
        optimizer.step()


@script
def r1_through_a_method(d, g, steps):
    optimizer = torch.optim.Adam(d.parameters(), 1e-3)
    for _ in range(steps):
        x = data()[0].requires_grad_()
        (grad,) = torch.autograd.grad(d.features(x).sum(), x, create_graph=True)
        loss = grad.square().sum() + d(x.detach()).mean()
        optimizer.zero_grad()
        loss.backward()
        yield loss, d
        optimizer.step()


@script
def r1_by_backward(d, g, steps):
    optimizer = torch.optim.Adam(d.parameters(), 1e-3)
    for _ in range(steps):
        x = data()[0].requires_grad_()
        optimizer.zero_grad()
        d(x).sum().backward(create_graph=True)
        loss = x.grad.square().sum()
        x.grad = None
        loss.backward()
        yield loss, d
        optimizer.step()


@script
def r1_by_backward_to_the_images(d, g, steps):
    optimizer = torch.optim.Adam(d.parameters(), 1e-3)
    for _ in range(steps):
        x = data()[0].requires_grad_()
        optimizer.zero_grad()
        d(x).sum().backward(create_graph=True, inputs=[x])
        loss = x.grad.square().sum()
        x.grad = None
        loss.backward()
        yield loss, d
        optimizer.step()


@script
def a_penalty_alone(d, g, steps):
    optimizer = torch.optim.AdamW(d.parameters(), 1e-3)
    for _ in range(steps):
        loss = penalty(d, data()[0].requires_grad_())
        optimizer.zero_grad()
        loss.backward()
        yield loss, d
        optimizer.step()


class OfBoth(nn.Module):
    """Sees an image and a smaller one, in a dictionary, as EG3D's discriminator does."""

    def __init__(self, d):
        super().__init__()
        self.d = d

    def forward(self, images):
        return self.d(images["image"] + F.interpolate(images["raw"], size=(8, 8), mode="bilinear"))


@script
def r1_at_a_dictionary_of_images(d, g, steps):
    both = OfBoth(d)
    optimizer = torch.optim.Adam(d.parameters(), 1e-3)
    for _ in range(steps):
        real = data()[0]
        images = {"image": real.requires_grad_(), "raw": F.avg_pool2d(real.detach(), 2).requires_grad_()}
        logits = both(images)
        grads = torch.autograd.grad(outputs=[logits.sum()], inputs=[*images.values()], create_graph=True)
        loss = (F.softplus(-logits).squeeze(1) + sum(grad.square().sum((1, 2, 3)) for grad in grads)).mean()
        optimizer.zero_grad()
        loss.backward()
        yield loss, d
        optimizer.step()


@script
def a_scaled_gradient_and_loss(d, g, steps):
    """As with mixed precision in pi-GAN's loop."""
    optimizer = torch.optim.Adam(d.parameters(), 1e-3)
    scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
    for _ in range(steps):
        x = data()[0].requires_grad_()
        logits = d(x)
        (grad,) = torch.autograd.grad(outputs=scaler.scale(logits.sum()), inputs=x, create_graph=True)
        loss = F.softplus(-logits).mean() + (grad / scaler.get_scale()).flatten(1).norm(2, dim=1).square().mean()
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        yield loss, d
        scaler.step(optimizer)
        scaler.update()


@script
def two_backwards_through_one_forward(d, g, steps):
    """As in FUNIT and denoising diffusion GANs."""
    optimizer = torch.optim.RMSprop(d.parameters(), 1e-4, weight_decay=1e-4)
    for _ in range(steps):
        real, z = data()
        optimizer.zero_grad()
        logits = d(real.requires_grad_())
        F.relu(1 - logits).mean().backward(retain_graph=True)
        (grad,) = torch.autograd.grad(logits.mean(), real, create_graph=True, retain_graph=True)
        loss = 10 * grad.square().sum() / len(real)
        loss.backward()
        F.relu(1 + d(g(z).detach())).mean().backward()
        yield loss, d
        optimizer.step()


@script
def two_discriminators_of_one_loop(d, g, steps):
    both = nn.ModuleList([d, Discriminator()])
    optimizers = [torch.optim.Adam(one.parameters(), 1e-3) for one in both]
    for _ in range(steps):
        x = data()[0].requires_grad_()
        loss = sum(penalty(one, x) + one(x.detach()).mean() for one in both)
        both.zero_grad()
        loss.backward()
        yield loss, both
        for optimizer in optimizers:
            optimizer.step()


@script
def a_gradient_of_a_gradient_in_a_loop(d, g, steps):
    optimizer = torch.optim.SGD(d.parameters(), 1e-3)
    for _ in range(steps):
        x = data()[0].requires_grad_()
        y = torch.tanh(d(x)).sum()
        for _ in range(2):
            y = torch.autograd.grad(y, x, create_graph=True)[0].square().sum()
        optimizer.zero_grad()
        y.backward()
        yield y, d
        optimizer.step()


@script
def hvp(d, g, steps):
    optimizer = torch.optim.SGD(d.parameters(), 1e-3)
    for _ in range(steps):
        x = data()[0].requires_grad_()
        (grad,) = torch.autograd.grad(d(x).sum(), x, create_graph=True)
        (product,) = torch.autograd.grad((grad * torch.ones_like(grad)).square().sum(), x, create_graph=True)
        loss = product.square().sum() + d(x).mean()
        optimizer.zero_grad()
        loss.backward()
        yield loss, d
        optimizer.step()


@script
def nothing_to_gain(d, g, steps):
    optimizer = torch.optim.Adam(d.parameters(), 1e-3)
    for _ in range(steps):
        loss = F.relu(1 + d(g(data()[1]).detach())).mean()
        optimizer.zero_grad()
        loss.backward()
        yield loss, d
        optimizer.step()


class Augmented(nn.Module):
    """Changes images on their way to the discriminator, and makes them require a gradient, as lightweight-gan does."""

    def __init__(self, d):
        super().__init__()
        self.d = d

    def forward(self, images, needs_gradient=False):
        images = images.detach() if needs_gradient else images
        images = images.flip(3).requires_grad_() if needs_gradient else images.flip(3)
        return images, self.d(images)


@script
def a_wrapper_that_makes_its_input_require_a_gradient(d, g, steps):
    wrapper = Augmented(d)
    d_optimizer, g_optimizer = torch.optim.Adam(d.parameters(), 1e-3), torch.optim.Adam(g.parameters(), 1e-3)
    for _ in range(steps):
        real, z = data()
        _, fake_logits = wrapper(g(z).detach(), False)
        images, logits = wrapper(real, True)
        (grad,) = torch.autograd.grad(logits.sum(), images, create_graph=True)
        loss = F.softplus(-logits).mean() + F.softplus(fake_logits).mean() + 5 * grad.square().sum((1, 2, 3)).mean()
        d_optimizer.zero_grad()
        loss.backward()
        yield loss, d
        d_optimizer.step()
        g_optimizer.zero_grad()
        F.softplus(-wrapper(g(z))[1]).mean().backward()
        g_optimizer.step()


class Growing(nn.Module):
    def __init__(self):
        super().__init__()
        self.of_image = nn.ModuleList([nn.Conv2d(3, 6, 1), nn.Conv2d(3, 6, 1)])
        self.convs = nn.ModuleList([nn.Conv2d(6, 6, 3, padding=1), nn.Conv2d(6, 6, 3, padding=1)])
        self.last = nn.Linear(6, 1)

    def forward(self, x, depth, alpha):
        y = F.leaky_relu(self.of_image[depth](x), 0.2)
        if depth:
            new = F.avg_pool2d(F.leaky_relu(self.convs[1](y), 0.2), 2)
            y = alpha * new + (1 - alpha) * F.leaky_relu(self.of_image[0](F.avg_pool2d(x, 2)), 0.2)
        return self.last(F.leaky_relu(self.convs[0](y), 0.2).mean((2, 3)))


@script
def progressive_growing(d, g, steps):
    """New layers begin with a weight of zero, and so with gradients of zeros. Weight decay moves them."""
    d = Growing()
    optimizer = torch.optim.SGD(d.parameters(), 1e-2, momentum=0.9, weight_decay=0.5)
    for number in range(steps):
        depth, x = number // 5 % 2, data()[0]
        x = x if depth else F.avg_pool2d(x, 2)
        alpha = number % 5 / 4
        (grad,) = torch.autograd.grad(d(x.requires_grad_(), depth, alpha).sum(), x, create_graph=True)
        loss = 10 * (grad.flatten(1).norm(dim=1) - 1).square().mean() + d(x.detach(), depth, alpha).mean()
        optimizer.zero_grad()
        loss.backward()
        yield loss, d
        optimizer.step()


@script
def ctgans_loop(d, g, steps):
    """The fake is not detached, the penalty goes first, and gradients are set to zeros."""
    d_optimizer, g_optimizer = torch.optim.Adam(d.parameters(), 1e-3), torch.optim.Adam(g.parameters(), 1e-3)
    for _ in range(steps):
        real, z = data()
        fake = g(z)
        logits, alpha = d(fake), torch.rand(4, 1, 1, 1)
        loss = logits.mean() - d(real).mean()
        pen = penalty(d, alpha * real + (1 - alpha) * fake)
        d_optimizer.zero_grad(set_to_none=False)
        pen.backward(retain_graph=True)
        loss.backward()
        yield pen, d
        d_optimizer.step()
        g_optimizer.zero_grad(set_to_none=False)
        (-d(g(data()[1])).mean()).backward()
        g_optimizer.step()


class Styled(nn.Module):
    """Returns an image and its style."""

    def __init__(self):
        super().__init__()
        self.mapping = nn.Sequential(nn.Linear(5, 6), nn.LeakyReLU(0.2), nn.Linear(6, 6), nn.LeakyReLU(0.2))
        self.first, self.conv = nn.Linear(6, 4 * 16), nn.ConvTranspose2d(4, 3, 4, stride=2, padding=1)

    def forward(self, z):
        w = self.mapping(z)
        return self.conv(F.leaky_relu(self.first(w), 0.2).view(-1, 4, 4, 4)), w


@script
def path_length(d, g, steps):
    g = Styled()
    optimizer = torch.optim.Adam([*g.parameters(), *d.parameters()], 1e-3)
    for number in range(steps):
        _, z = data()
        images, w = g(z)
        loss = F.softplus(-d(images)).mean()
        if number % 2 == 0:
            (grad,) = torch.autograd.grad((images * torch.randn_like(images)).sum(), w, create_graph=True)
            loss = loss + (grad.square().sum(1).sqrt() - 1).square().mean()
        optimizer.zero_grad()
        loss.backward()
        yield loss, g
        optimizer.step()


class Conditional(nn.Module):
    """Takes images and labels by name."""

    def __init__(self, d):
        super().__init__()
        self.d, self.labels = d, nn.Embedding(3, 8)

    def forward(self, images, labels):
        h = self.d.features(images).mean((2, 3))
        return self.d.last(h) + (self.labels(labels) * h).sum(1, keepdim=True)


@script
def r1_at_named_images(d, g, steps):
    d = Conditional(d)
    optimizer = torch.optim.Adam(d.parameters(), 1e-3)
    for _ in range(steps):
        x, labels = data()[0].requires_grad_(), torch.randint(0, 3, (4,))
        (grad,) = torch.autograd.grad(d(images=x, labels=labels).sum(), x, create_graph=True)
        loss = grad.square().sum() + d(images=x.detach(), labels=labels).mean()
        optimizer.zero_grad()
        loss.backward()
        yield loss, d
        optimizer.step()


class Skipping(nn.Module):
    """Skips a branch in some steps. The branch ends with a weight of zero at first."""

    def __init__(self, skips):
        super().__init__()
        self.skips = list(skips)
        self.first, self.branch, self.zero = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 1)
        self.last = nn.Linear(8, 1)
        nn.init.zeros_(self.zero.weight)

    def forward(self, x):
        h = F.leaky_relu(self.first(x), 0.2)
        if not self.skips.pop(0):
            h = h + self.zero(F.leaky_relu(self.branch(h), 0.2))
        return self.last(F.leaky_relu(h, 0.2).mean((2, 3)))


def skipping(skips, steps):
    d = Skipping([skips[number % len(skips)] for number in range(steps)])
    optimizer = torch.optim.SGD(d.parameters(), 1e-2, momentum=0.9, weight_decay=0.5)
    for _ in range(steps):
        loss = penalty(d, data()[0].requires_grad_())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        yield loss + sum(parameter.norm() for parameter in d.parameters()), d  # with the gradients of the step


@script
def a_branch_that_the_first_steps_take(d, g, steps):
    return skipping([0, 0, 1, 0, 1], steps)


@script
def a_branch_that_the_first_steps_skip(d, g, steps):
    return skipping([1, 1, 0, 1, 0], steps)


@dataclass
class Judged:
    logits: torch.Tensor
    features: torch.Tensor


class OfObjects(nn.Module):
    """Takes a namespace and returns a dataclass."""

    def __init__(self, d):
        super().__init__()
        self.d = d

    def forward(self, given):
        features = self.d.features(given.images)
        return Judged(self.d.last(features.mean((2, 3))), features)


@script
def r1_at_images_in_an_object(d, g, steps):
    d = OfObjects(d)
    optimizer = torch.optim.Adam(d.parameters(), 1e-3)
    for _ in range(steps):
        given = SimpleNamespace(images=data()[0].requires_grad_())
        judged = d(given)
        (grad,) = torch.autograd.grad(judged.logits.sum(), given.images, create_graph=True)
        loss = grad.square().sum() + judged.logits.mean() + judged.features.square().mean()
        optimizer.zero_grad()
        loss.backward()
        yield loss, d
        optimizer.step()

"""Layers that compute something else than their names promise are left alone, whatever their values are at first."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrize
from torch.nn.utils import spectral_norm as torch_hook
from torch.nn.utils.parametrizations import _SpectralNorm, spectral_norm
from torch.nn.utils.spectral_norm import SpectralNorm

import fastgan
from tests.convert.named_stand_ins import MinibatchDiscrimination1d, MinibatchStdLayer, SNConv2d, SpectralNorm2d
from tests.convert.stand_ins import IMAGES, BigConv, BigLinear, StridedStd


class Halved(_SpectralNorm):
    def forward(self, weight):
        return super().forward(weight) / 2


class MoreIterations(_SpectralNorm):
    def _power_method(self, weight_mat, n_power_iterations):
        super()._power_method(weight_mat, n_power_iterations + 2)


class IteratesInEvaluation(SpectralNorm):
    def compute_weight(self, module, do_power_iteration):
        return super().compute_weight(module, True)


def of_class(cls):
    layer = nn.Conv2d(3, 5, 3)
    if issubclass(cls, nn.Module):
        parametrize.register_parametrization(layer, "weight", cls(layer.weight))
    else:
        torch_hook(layer)
        for hook in layer._forward_pre_hooks.values():
            hook.__class__ = cls
    return layer


def halved_on_the_instance(make):
    layer = make(nn.Conv2d(3, 5, 3))
    (norm,) = layer._forward_pre_hooks.values() if make is torch_hook else layer.parametrizations.weight
    name = "compute_weight" if make is torch_hook else "forward"
    own = getattr(type(norm), name)
    setattr(norm, name, lambda *args, **kwargs: own(norm, *args, **kwargs) / 2)
    return layer


OF_PYTORCH = {
    "a subclass of the parametrization": lambda: of_class(Halved),
    "a subclass with its own power method": lambda: of_class(MoreIterations),
    "a subclass of the hook": lambda: of_class(IteratesInEvaluation),
    "a parametrization with its own forward": lambda: halved_on_the_instance(spectral_norm),
    "a hook with its own method": lambda: halved_on_the_instance(torch_hook),
}


@pytest.mark.parametrize("name", OF_PYTORCH)
def test_what_is_derived_from_pytorchs_spectral_norm_keeps_its_code(name):
    torch.manual_seed(0)
    layer = OF_PYTORCH[name]()
    state = copy.deepcopy(layer.state_dict())
    expected = [layer(IMAGES), layer.eval()(IMAGES)]
    layer.load_state_dict(state)
    model = nn.Sequential(layer.train())
    report = fastgan.convert(model)
    assert not report.replaced
    assert "methods of its own" in report.rows[1].reason
    with pytest.raises(ValueError, match="no spectrally normalized weight"):
        fastgan.nn.utils.fuse_spectral_norm(model)
    assert all(map(torch.equal, [model(IMAGES), model.eval()(IMAGES)], expected))


class Bounded(SNConv2d):
    """Sigma has a lower bound, which the weights do not reach at first."""

    least = 1.0

    def W_(self):  # noqa: N802
        sigma = (self.weight / super().W_()).mean()
        return self.weight / sigma.clamp(min=self.least)


class TinyBound(Bounded):
    least = 1e-4


class Scaled(SNConv2d):
    """With a gain of one and a mask of ones."""

    def __init__(self, *args, tensor):
        super().__init__(*args)
        self.gain = tensor

    def W_(self):  # noqa: N802
        return super().W_() * self.gain


class Counting(SNConv2d):
    calls = 0

    def W_(self):  # noqa: N802
        self.calls += 1
        return super().W_() if self.calls % 100 else self.weight


class BoundedWrapper(SpectralNorm2d):
    def forward(self, *args):
        super().forward(*args)
        sigma = (self.w_bar / self.module.weight).mean()
        setattr(self.module, self.name, self.w_bar / sigma.clamp(min=1e-3))
        return self.module.forward(*args)


class MinibatchStdOfBoundedVariance(StridedStd):
    def variance(self, y):
        return super().variance(y).clamp(max=100)


class CountingMinibatchStd(MinibatchStdLayer):
    calls = 0

    def forward(self, x):
        self.calls += 1
        return super().forward(x) if self.calls % 1000 else F.pad(x, (0, 0, 0, 0, 0, 1))


class MinibatchStdOfLargeBatches(MinibatchStdLayer):
    def forward(self, x):
        return MinibatchStdLayer(None)(x) if len(x) > 48 else super().forward(x)


class MinibatchStdOfLargeImages(MinibatchStdLayer):
    def forward(self, x):
        if x.shape[-1] <= 16:
            return super().forward(x)
        statistic = super().forward(F.avg_pool2d(x, 2))[:, x.shape[1] :, :1, :1]
        return torch.cat([x, statistic.expand(-1, -1, *x.shape[2:])], 1)


class BoundedDiscrimination(MinibatchDiscrimination1d):
    def forward(self, x):
        m = (x @ self.T.flatten(1)).view(1, -1, *self.T.shape[1:])
        distances = (m - m.transpose(0, 1)).abs().sum(3).clamp(max=10)
        return torch.cat([x, torch.exp(-distances).sum(0) - 1], 1)


class CountingDiscrimination(MinibatchDiscrimination1d):
    calls = 0

    def forward(self, x):
        self.calls += 1
        return super().forward(x)


LEFT = {
    "a bound of sigma": lambda: large(Bounded(3, 5, 3)),
    "a small bound of sigma": lambda: TinyBound(3, 5, 3),
    "a gain": lambda: Scaled(3, 5, 3, tensor=nn.Parameter(torch.ones(()))),
    "a mask": lambda: Scaled(3, 5, 3, tensor=nn.Buffer(torch.ones(5, 1, 1, 1, dtype=torch.bool))),
    "a counter": lambda: Counting(3, 5, 3),
    "a wrapper with a bound": lambda: BoundedWrapper(nn.Conv2d(3, 5, 3)),
    "a bounded variance": lambda: MinibatchStdOfBoundedVariance(4),
    "a stddev with a counter": lambda: CountingMinibatchStd(4),
    "other groups in large batches": lambda: MinibatchStdOfLargeBatches(4),
    "pooled large images": lambda: MinibatchStdOfLargeImages(4),
    "bounded distances": lambda: BoundedDiscrimination(6, 4, 3),
    "a discrimination with a counter": lambda: CountingDiscrimination(6, 4, 3),
}


def large(layer):
    layer.weight.data.mul_(100)
    return layer


@pytest.mark.parametrize("name", LEFT)
def test_a_layer_is_tried_with_values_that_it_does_not_have_yet(name):
    torch.manual_seed(0)
    layer = LEFT[name]()
    kind = type(layer)
    (row,) = fastgan.convert(nn.Sequential(layer), mend=True).rows[1:2]
    assert row.replaced_by is None, row.reason
    assert type(layer) is kind
    if "counter" in name:
        assert "changes calls" in row.reason


def test_a_norm_below_its_eps_gives_the_same_weight_and_sigma():
    for layer in (BigConv(3, 5, 3).double(), BigLinear(192, 1).double(), BigLinear(1, 5).double()):
        layer.weight.data.mul_(1e-6)  # eps is 1e-6
        x = IMAGES.double() if layer.weight.ndim == 4 else torch.randn(8, layer.in_features).double()
        converted = copy.deepcopy(layer)
        assert fastgan.convert(converted).replaced
        torch.testing.assert_close(converted(x), layer(x))
        torch.testing.assert_close(converted.sv0, layer.sv0)

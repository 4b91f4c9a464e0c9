"""A discriminator written against torch_utils.ops, with functions imported by module and by name."""

import torch
from torch import nn
from torch_utils.ops import bias_act, conv2d_gradfix, conv2d_resample, fma, grid_sample_gradfix, upfirdn2d
from torch_utils.ops.filtered_lrelu import filtered_lrelu


class Conv(nn.Module):
    def __init__(self, a, b, kernel, down=1):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(b, a, kernel, kernel)), nn.Parameter(torch.zeros(b))
        self.gain, self.down, self.padding = (a * kernel**2) ** -0.5, down, kernel // 2
        self.register_buffer("f", upfirdn2d.setup_filter([1, 3, 3, 1]))

    def forward(self, x):
        w = self.weight * self.gain
        x = conv2d_resample.conv2d_resample(x, w, f=self.f, down=self.down, padding=self.padding)
        return bias_act.bias_act(x, self.bias.to(x.dtype), act="lrelu", clamp=256)


class Discriminator(nn.Module):
    def __init__(self):
        super().__init__()
        self.rgb, self.one, self.two, self.skip = (
            Conv(3, 16, 1),
            Conv(16, 16, 3),
            Conv(16, 32, 3, 2),
            Conv(16, 32, 1, 2),
        )
        self.last, self.head = nn.Parameter(torch.randn(8, 32, 3, 3) / 16), nn.Linear(8 * 64, 1)
        self.register_buffer("f", torch.tensor([1.0, 2.0, 2.0, 1.0]) / 6)
        self.register_buffer("grid", torch.linspace(-1, 1, 16)[:, None].expand(16, 16).contiguous())

    def forward(self, x):
        grid = torch.stack([self.grid, self.grid.t()], -1).expand(len(x), -1, -1, -1)
        x = grid_sample_gradfix.grid_sample(x, grid)
        x = self.one(self.rgb(x))
        x = (self.two(x) + self.skip(x)) * 0.5**0.5
        x = filtered_lrelu(x, self.f, self.f, up=2, down=2, padding=[3, 3, 3, 3])
        x = fma.fma(x, x.new_tensor(0.5), x.new_tensor(0.1))
        x = conv2d_gradfix.conv2d(x, self.last, padding=1)
        return self.head(x.flatten(1))

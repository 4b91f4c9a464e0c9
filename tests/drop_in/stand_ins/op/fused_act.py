import torch
from torch import nn
from torch.utils.cpp_extension import load

extension = load("fused", sources=["no such file.cu"])


class FusedLeakyReLU(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.bias = nn.Parameter(torch.ones(channels))

    def forward(self, input):
        return fused_leaky_relu(input, self.bias)


def fused_leaky_relu(input, bias=None, negative_slope=0.2, scale=2**0.5):
    return extension.fused_bias_act(input, bias, negative_slope, scale)

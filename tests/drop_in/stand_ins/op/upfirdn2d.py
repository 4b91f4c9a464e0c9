"""As in the original code base, the import compiles an extension."""

from torch.utils.cpp_extension import load

extension = load("upfirdn2d", sources=["no such file.cu"])


def upfirdn2d(input, kernel, up=1, down=1, pad=(0, 0)):
    return extension.upfirdn2d(input, kernel, up, down, pad)

from torch_utils.ops import conv2d_gradfix, upfirdn2d


def profiled(function):
    """As that family's decorator, it hides the parameters."""

    def decorator(*args, **kwargs):
        return function(*args, **kwargs)

    decorator.__name__ = function.__name__
    return decorator


@profiled
def conv2d_resample(x, w, f=None, up=1, down=1, padding=0, groups=1, flip_weight=True, flip_filter=False):
    size = 1 if f is None else f.shape[-1]
    around = upfirdn2d._four(padding)
    if up > 1:
        around = [p + q for p, q in zip(around, [(size + up - 1) // 2, (size - up) // 2] * 2, strict=True)]
    if down > 1:
        around = [p + q for p, q in zip(around, [(size - down + 1) // 2, (size - down) // 2] * 2, strict=True)]
    x = upfirdn2d.upfirdn2d(x, f if up > 1 else None, up, 1, around, flip_filter, up**2)
    x = conv2d_gradfix.conv2d(x, w if flip_weight else w.flip((2, 3)), groups=groups)
    return upfirdn2d.upfirdn2d(x, f if down > 1 else None, 1, down, 0, flip_filter)

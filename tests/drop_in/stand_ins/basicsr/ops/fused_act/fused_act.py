def fused_leaky_relu(input, bias, negative_slope=0.2, scale=2**0.5):
    raise RuntimeError("the extension is not there")

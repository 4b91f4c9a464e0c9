def upfirdn2d(input, kernel, up=1, down=1, pad=(0, 0)):
    raise RuntimeError("the extension is not there")

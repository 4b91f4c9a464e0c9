def fma(a, b, c, rounding):
    return (a * b + c).round(decimals=rounding)

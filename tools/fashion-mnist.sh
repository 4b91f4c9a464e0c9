#!/bin/sh
# fashion-mnist.sh: puts Debian's copy of Fashion-MNIST where `fastgan train` looks for it.
set -eu
if [ -n "${FASTGAN_DATA:-}" ] || [ -d /usr/share/datasets/fashion-mnist ]; then
    exit 0
fi
cache=${XDG_CACHE_HOME:-$HOME/.cache}/fastgan
[ ! -e "$cache/fashion-mnist/train-images-idx3-ubyte.gz" ] || exit 0

echo "fetching Fashion-MNIST into $cache"
if ! sh "$(dirname "$0")/debian-package.sh" dataset-fashion-mnist "$cache/debian"; then
    cat >&2 <<END

No Fashion-MNIST.  Any one of these gives it to fastgan:
  FASTGAN_DATA=DIR   a folder that holds train-images-idx3-ubyte.gz and train-labels-idx1-ubyte.gz
  $cache/fashion-mnist/   the same files there
  apt-get install dataset-fashion-mnist   as root, on Debian or Ubuntu
END
    exit 1
fi
rm -rf "$cache/fashion-mnist"
ln -s debian/usr/share/datasets/fashion-mnist "$cache/fashion-mnist"

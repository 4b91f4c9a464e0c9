#!/bin/sh
# fashion-mnist.sh: downloads Debian's copy of Fashion-MNIST to the folder where `fastgan train` looks for it.
set -eu
if [ -n "${FASTGAN_DATA:-}" ] || [ -d /usr/share/datasets/fashion-mnist ]; then
    exit 0
fi
cache=${XDG_CACHE_HOME:-$HOME/.cache}/fastgan
[ ! -e "$cache/fashion-mnist/train-images-idx3-ubyte.gz" ] || exit 0

echo "downloading Fashion-MNIST into $cache"
if ! sh "$(dirname "$0")/debian-package.sh" dataset-fashion-mnist "$cache/debian"; then
    cat >&2 <<END

Fashion-MNIST was not found.  Provide it in one of these ways:
  FASTGAN_DATA=DIR   a folder with train-images-idx3-ubyte.gz and train-labels-idx1-ubyte.gz
  $cache/fashion-mnist/   a folder with the same files
  apt-get install dataset-fashion-mnist   as root, on Debian or Ubuntu
END
    exit 1
fi
rm -rf "$cache/fashion-mnist"
ln -s debian/usr/share/datasets/fashion-mnist "$cache/fashion-mnist"

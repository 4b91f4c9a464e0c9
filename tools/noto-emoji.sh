#!/bin/sh
# noto-emoji.sh: downloads Debian's color emoji font to the folder where `fastgan train emoji` looks for it.
set -eu
[ ! -e /usr/share/fonts/truetype/noto/NotoColorEmoji.ttf ] || exit 0
cache=${XDG_CACHE_HOME:-$HOME/.cache}/fastgan
[ ! -e "$cache/noto-emoji/NotoColorEmoji.ttf" ] || exit 0

echo "downloading Noto color emoji into $cache"
if ! sh "$(dirname "$0")/debian-package.sh" fonts-noto-color-emoji "$cache/debian"; then
    cat >&2 <<END

The emoji font was not found.  Provide it in one of these ways:
  --data FILE        flag of fastgan train, with the font file NotoColorEmoji.ttf
  $cache/noto-emoji/   a folder with the same file
  apt-get install fonts-noto-color-emoji   as root, on Debian or Ubuntu
END
    exit 1
fi
rm -rf "$cache/noto-emoji"
ln -s debian/usr/share/fonts/truetype/noto "$cache/noto-emoji"

#!/bin/sh
# noto-emoji.sh: puts Debian's colour emoji font where `fastgan train emoji` looks for it.
set -eu
[ ! -e /usr/share/fonts/truetype/noto/NotoColorEmoji.ttf ] || exit 0
cache=${XDG_CACHE_HOME:-$HOME/.cache}/fastgan
[ ! -e "$cache/noto-emoji/NotoColorEmoji.ttf" ] || exit 0

echo "fetching Noto colour emoji into $cache"
if ! sh "$(dirname "$0")/debian-package.sh" fonts-noto-color-emoji "$cache/debian"; then
    cat >&2 <<END

No emoji.  Any one of these gives them to fastgan:
  --data FILE        of fastgan train: the font file NotoColorEmoji.ttf
  $cache/noto-emoji/   the same file there
  apt-get install fonts-noto-color-emoji   as root, on Debian or Ubuntu
END
    exit 1
fi
rm -rf "$cache/noto-emoji"
ln -s debian/usr/share/fonts/truetype/noto "$cache/noto-emoji"

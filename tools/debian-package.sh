#!/bin/sh
# debian-package.sh [--with-dependencies] "NAME..." DESTDIR
# Unpacks Debian packages into DESTDIR, unless that was already done.  Needs no root and installs nothing.
set -eu
closure=
if [ "$1" = --with-dependencies ]; then
    closure=yes
    shift
fi
names=$1
mkdir -p "$2"
dest=$(cd "$2" && pwd)
mark=$dest/.unpacked-$(echo "$names" | tr ' ' +)
[ ! -e "$mark" ] || exit 0

fail() {
    cat >&2 <<END
debian-package.sh: cannot fetch Debian's $names: $1
  with a network: run this again, or run as root: apt-get install $names
  without a network: for each .deb file, dpkg-deb -x FILE '$dest'; then touch '$mark'
END
    exit 1
}

for tool in apt-get dpkg-deb; do
    command -v $tool >/dev/null || fail "$tool was not found (is this Debian or Ubuntu?)"
done
work=$(mktemp -d "$dest/.fetch.XXXXXX")
trap 'rm -rf "$work"' EXIT
trap 'exit 1' HUP INT TERM
cd "$work"

apt() { apt-get -qq -o APT::Sandbox::User= "$@" >>log 2>&1; }
# Use separate package lists: the system's may be missing or old, and only root can update them.
apt_here() {
    apt -o Dir::State="$work/state" -o Dir::State::status="$work/status" -o Dir::Cache="$work/cache" "$@"
}
prepare() {
    mkdir -p state/lists/partial cache/archives/partial
    : >status
    apt_here update || true
}
why() { fail "$(grep '^[EW]:' log | tail -n 3)"; }

# shellcheck disable=SC2086 # one word per package
if [ -n "$closure" ]; then
    prepare
    apt_here install --download-only --no-install-recommends $names || why
    mv cache/archives/*.deb .
elif ! apt download $names; then
    prepare
    apt_here download $names || why
fi
for file in *.deb; do
    dpkg-deb -x "$file" "$dest" || fail "$file cannot be unpacked"
done
: >"$mark"

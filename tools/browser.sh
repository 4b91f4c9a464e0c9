#!/bin/sh
# browser.sh: installs Debian's Chromium if there is no browser that takes screenshots of the pages.
set -eu
there() {
    # The names are those in tests/trainer/report/test_browser.py.
    for name in chromium chromium-browser google-chrome; do
        if command -v "$name" >/dev/null; then return 0; fi
    done
    return 1
}
fail() {
    echo "browser.sh: $1: install Chromium or Chrome, on Debian with apt-get install chromium as root" >&2
    exit 1
}

if there; then exit 0; fi
if [ "$(id -u)" != 0 ] || ! command -v apt-get >/dev/null; then fail "no browser was found"; fi
echo "installing Chromium"
# One broken source makes update fail although the others have the packages.
apt-get update -qq || echo "browser.sh: apt-get update failed" >&2
# On Ubuntu the package chromium is missing or only starts a snap.
DEBIAN_FRONTEND=noninteractive apt-get install --yes -qq --no-install-recommends chromium fonts-dejavu-core >/dev/null ||
    fail "Chromium could not be installed"
if ! there; then fail "Chromium was installed, but no browser is in the PATH"; fi

#!/bin/sh
# browser.sh: installs Debian's Chromium if there is no browser that takes screenshots of the pages.
set -eu
for name in chromium chromium-browser google-chrome; do
    if command -v "$name" >/dev/null; then exit 0; fi
done
if [ "$(id -u)" != 0 ] || ! command -v apt-get >/dev/null; then
    echo "no browser was found: install Chromium, on Debian with apt-get install chromium as root" >&2
    exit 1
fi
echo "installing Chromium"
apt-get update -qq
apt-get install --yes -qq --no-install-recommends chromium fonts-dejavu-core >/dev/null

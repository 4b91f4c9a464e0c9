#!/bin/sh
# venv.sh PYTHON VENV pinned|keep: creates VENV, and first provides the Debian packages that it needs.
# Root installs them; other users unpack them into a cache folder.
set -eu
python=$1
venv=$2
mode=$3
here=$(dirname "$0")
cache=${XDG_CACHE_HOME:-$HOME/.cache}/fastgan

ask() { "$python" -c "$1" 2>/dev/null; }
ask 'import sys; sys.exit(sys.version_info < (3, 11))' || {
    echo "venv.sh: $python is not Python 3.11 or later; choose one with make PYTHON=..." >&2
    exit 1
}
has_pip() { ask 'import ensurepip, venv'; }
has_headers() { [ -e "$(ask 'import sysconfig; print(sysconfig.get_path("include"))')/Python.h" ]; }
has_compiler() { [ -n "${CXX:-}" ] || command -v c++ >/dev/null || command -v clang++ >/dev/null; }

if [ "$(ask 'import sys; print(sys.base_prefix)')" = /usr ] && command -v apt-get >/dev/null; then
    missing=
    has_pip || missing="$missing python3-venv"
    has_compiler || missing="$missing g++"
    has_headers || missing="$missing libpython3-dev"
    if [ -z "$missing" ]; then
        :
    elif [ "$(id -u)" = 0 ]; then
        echo "installing$missing"
        export DEBIAN_FRONTEND=noninteractive
        # shellcheck disable=SC2086 # one word per package
        { apt-get -qq update && apt-get -qq -y --no-install-recommends install $missing; } >/dev/null ||
            echo "venv.sh: apt-get could not install$missing: continuing without them" >&2
    elif ! has_compiler || ! has_headers; then
        echo "unpacking a C++ compiler and Python's headers into $cache/toolchain"
        if sh "$here/debian-package.sh" --with-dependencies "g++ libpython3-dev" "$cache/toolchain"; then
            mkdir -p "$cache/toolchain/bin"
            cat >"$cache/toolchain/bin/c++" <<END
#!/bin/sh
root='$cache/toolchain'
export LD_LIBRARY_PATH="\$root/usr/lib/$(dpkg-architecture -qDEB_HOST_MULTIARCH 2>/dev/null || echo "$(uname -m)-linux-gnu")"
export PATH="\$root/usr/bin:\$PATH"
exec "\$root/usr/bin/g++" --sysroot="\$root" "\$@"
END
            chmod +x "$cache/toolchain/bin/c++"
        else
            echo "venv.sh: continuing without a compiler: fastgan will use only PyTorch and Triton" >&2
        fi
    fi
fi

rm -rf "$venv"
set -- "$venv"
[ "$mode" != keep ] || set -- --system-site-packages "$@"
if has_pip; then
    "$python" -m venv "$@"
else
    sh "$here/debian-package.sh" python3-pip-whl "$cache/debian"
    "$python" -m venv --without-pip "$@"
    wheel=$(echo "$cache"/debian/usr/share/python-wheels/pip-*.whl)
    "$venv/bin/python" "$wheel/pip" --disable-pip-version-check install --quiet --no-index "$wheel"
fi

if [ "$mode" = keep ]; then
    # If $python belongs to a virtual environment, --system-site-packages does not include that environment's packages.
    ask 'import sysconfig; print(sysconfig.get_path("purelib"))' \
        >"$("$venv/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/kept-packages.pth"
fi

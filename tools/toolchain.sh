#!/bin/sh
# Sourced: points the build at the compiler and the Python headers that venv.sh unpacked, where it had to.
toolchain=${XDG_CACHE_HOME:-$HOME/.cache}/fastgan/toolchain
if [ -e "$toolchain/bin/c++" ] && [ -z "${CXX:-}" ]; then
    export CXX="$toolchain/bin/c++"
    for headers in "$toolchain"/usr/include/python3.*; do
        export CMAKE_ARGS="-DPython_INCLUDE_DIR=$headers ${CMAKE_ARGS:-}"
    done
fi

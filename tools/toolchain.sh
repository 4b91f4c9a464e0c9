#!/bin/sh
# Source this file: it makes the build use the compiler and Python headers that venv.sh unpacked, if any.
toolchain=${XDG_CACHE_HOME:-$HOME/.cache}/fastgan/toolchain
if [ -e "$toolchain/bin/c++" ] && [ -z "${CXX:-}" ]; then
    export CXX="$toolchain/bin/c++"
    for headers in "$toolchain"/usr/include/python3.*; do
        export CMAKE_ARGS="-DPython_INCLUDE_DIR=$headers ${CMAKE_ARGS:-}"
    done
fi

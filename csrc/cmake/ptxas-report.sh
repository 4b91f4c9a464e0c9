#!/bin/sh
# ptxas-report.sh DIR NVCC...: runs the compiler and writes its messages to DIR/<source>.txt
set -u
dir=$1
shift
for arg; do
    case $arg in *.cu) source=$(basename "$arg" .cu) ;; esac
done
mkdir -p "$dir"
"$@" 2>"$dir/$source.txt"
status=$?
[ $status -eq 0 ] || cat "$dir/$source.txt" >&2
exit $status

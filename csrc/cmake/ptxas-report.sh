#!/bin/sh
# ptxas-report.sh DIR NVCC...: runs the compiler, writes its messages to DIR/<source>.txt and prints warnings and errors.
set -u
dir=$1
shift
for arg; do
    case $arg in *.cu) source=$(basename "$arg" .cu) ;; esac
done
mkdir -p "$dir"
"$@" 2>"$dir/$source.txt"
status=$?
if [ $status -ne 0 ] || grep -qi warning "$dir/$source.txt"; then cat "$dir/$source.txt" >&2; fi
exit $status

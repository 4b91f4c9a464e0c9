"""Static costs of the Triton kernels: speeds predicted from machine code, without a GPU.

    python -m tools.static_costs                 print the table
    python -m tools.static_costs --only norm.    only the kernels and cases whose name contains a text
    python -m tools.static_costs --write         renew the record in benchmarks/results/static/

fastgan's own launch code runs on CPU tensors with a recorder in the launcher's place. Grid, constants and alignment are
those of a launch. Each kernel is compiled for an architecture and disassembled with line information.

Counted: instructions, subroutine calls and barriers in the hot loop, spills, widths of global accesses, registers,
shared memory. Derived: instructions per element. A loop's elements are the bytes that its loads and stores move,
divided by the bytes that ``model.py`` states for each ``for`` of the source; a loop belongs to the ``for`` on the line
of its backward branch. Both sides of a branch are counted, except remainders of an unrolled loop that the size skips
and 64-bit divisions behind a test of whether 32 bits do. "?" marks rows where this derivation fails, "~" rows whose
elements are stated by hand. ``by_hand.py`` has kernels whose loops do not run over bytes, ``cuda.py`` the CUDA kernels
(it needs nvcc), ``amd.py`` counts for AMD.

Predicted, in microseconds on an H200:

    floor    every operand once through memory at 4.8 TB/s, or the formula's operations
    dram     the same, with repeated reads that L2 doesn't hold
    issue    the busiest of a scheduler's issue port and its pipes
    latency  one warp alone, waiting for its operands, times rounds of resident programs
    fraction floor / the longest of these

These are not modeled: launches (2 to 3 us each), the last programs' imbalance, uncoalesced accesses, bank conflicts,
divergence, instruction caches. The prediction is no measurement.
"""

"""Verification of fastgan against plain PyTorch in lockstep."""

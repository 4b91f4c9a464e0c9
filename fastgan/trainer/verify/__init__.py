"""Fused and pure PyTorch in lockstep."""

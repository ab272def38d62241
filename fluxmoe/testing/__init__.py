"""Aids for testing FluxMoE and policies: checkpoints, faults, conformance."""

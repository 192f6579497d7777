"""Calibration: what is observed of a model while data flows through it block by block."""

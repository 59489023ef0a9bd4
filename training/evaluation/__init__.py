"""Evaluation of the embedded family: generated clips against true renders."""

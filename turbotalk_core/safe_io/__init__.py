"""Checks of untrusted names and files, before any other code uses them."""

"""Checks of names and files that come from strangers, before anything else uses them."""

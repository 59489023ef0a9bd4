"""File formats of models: tensors out of files, and networks out of and into them."""

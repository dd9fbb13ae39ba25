"""Import and export of released checkpoints: invertible tables of names, and the files of tensors."""

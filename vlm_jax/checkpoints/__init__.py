"""Released checkpoints in and out: invertible tables of names, and the files that hold the tensors."""

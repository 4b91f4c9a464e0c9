"""Reports of a run: its page, charts, pictures, TensorBoard."""

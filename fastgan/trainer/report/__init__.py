"""What a run shows: its page, charts, pictures, TensorBoard."""

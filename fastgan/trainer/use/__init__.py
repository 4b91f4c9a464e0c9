"""What a trained generator is used for: samples, interpolations, projections, scores."""

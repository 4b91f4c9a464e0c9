"""Uses of a trained generator: samples, interpolations, projections, scores."""

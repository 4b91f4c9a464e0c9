"""Real samples: data sets, toy distributions, caches and held-out samples."""

"""Where samples come from: data sets, toy distributions, caches, held-out samples."""

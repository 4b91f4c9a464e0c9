"""The reference trainer: a small GAN trainer that exercises fastgan on real work."""

"""Components of a GAN: losses, optimizers, penalties, averaged weights, augmentation."""

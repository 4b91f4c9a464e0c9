"""The parts of the game: losses, optimizers, penalties, averaged weights, augmentation."""

"""fastgan in existing training code: `fastgan run` and `fastgan.enabled`. Neither needs an edit of a model."""

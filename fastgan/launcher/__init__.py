"""fastgan in unchanged training code: `fastgan run` and `fastgan.enabled`."""

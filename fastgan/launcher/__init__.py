"""fastgan in existing training code: ``fastgan run`` and ``fastgan.enabled``. Neither needs an edit of a model."""

from fastgan.launcher.session import enabled

__all__ = ["enabled"]

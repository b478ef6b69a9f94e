"""muser_dist: distributed pretraining of music-and-language models.

The public names load on first use, so that `import muser_dist` costs nothing and inference
needs neither Ray nor DeepSpeed.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from muser_dist.muser import Muser as Muser
    from muser_dist.recipes import load_recipe as load_recipe

__version__ = "0.1.0"
__all__ = ["Muser", "__version__", "load_recipe"]


def __getattr__(name: str) -> Any:
    if name == "Muser":
        from muser_dist.muser import Muser

        return Muser
    if name == "load_recipe":
        from muser_dist.recipes import load_recipe

        return load_recipe
    raise AttributeError(f"module 'muser_dist' has no attribute {name!r}")

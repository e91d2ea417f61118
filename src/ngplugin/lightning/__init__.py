"""Natural gradient in a Lightning trainer."""

from ngplugin.lightning.callback import NaturalGradient as NaturalGradient

__all__ = ["NaturalGradient"]

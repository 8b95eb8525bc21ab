"""The demo: a small Goku learns pictures and clips, survives a kill and paints from noise."""

from goku.demo.media import DemoError, collect
from goku.demo.run import DemoFailed, run_demo

__all__ = ["DemoError", "DemoFailed", "collect", "run_demo"]

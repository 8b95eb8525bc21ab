"""The demo: a small Goku learns pictures and clips, survives a kill and paints from noise; then a recipe's stages."""

from goku.demo.media import DemoError, collect
from goku.demo.pages import run_pages
from goku.demo.recipe_run import run_recipe_demo
from goku.demo.run import run_demo
from goku.demo.watching import DemoFailed

__all__ = ["DemoError", "DemoFailed", "collect", "run_demo", "run_pages", "run_recipe_demo"]

"""The demo: a small Goku learns pictures and clips, survives a kill and paints from noise."""

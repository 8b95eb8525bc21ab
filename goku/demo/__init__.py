"""The demo: a small Goku learns real pictures and clips, survives a kill and paints them from noise."""

"""The training runtime, usable alone: it needs torch and knows nothing of any model.

Nothing happens at import, and the caller owns ``init_process_group``. Parts are imported by name:
`goku_runtime.checkpoint`.
"""

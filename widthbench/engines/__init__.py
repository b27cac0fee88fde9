"""Where cells run. Every engine calls the same ``run_cell``. Nothing heavy is imported here:
workers are pinned first.
"""

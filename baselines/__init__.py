"""The baselines that the documented techniques are compared with, one file each."""

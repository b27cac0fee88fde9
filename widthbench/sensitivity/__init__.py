"""What the loss does when a channel is removed or split: ablation, derivatives, splitting
matrices.
"""

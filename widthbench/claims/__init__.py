"""What the source documents report, and whether it was reproduced."""

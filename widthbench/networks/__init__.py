"""Networks: timm's by name, those of the source documents, and their weights."""

"""The techniques of the source documents, one file each."""

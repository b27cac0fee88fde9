"""What a technique is, what it is given, and how it is found."""

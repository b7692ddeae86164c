"""Two towers, projected into one space; saved and loaded with one call."""

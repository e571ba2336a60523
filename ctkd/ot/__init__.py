"""Transport between positions, and the choice of columns that are compared."""

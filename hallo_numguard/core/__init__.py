"""Types and helpers for all other packages here. Imports the standard library only."""

"""How a report looks. Imports no torch."""

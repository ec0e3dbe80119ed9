"""The fault campaign: every kind of fault, in every kind of engine, and what the guard must say about it."""

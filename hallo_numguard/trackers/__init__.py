"""Trackers that a run has already get its figures. None of them is ever started here."""

"""Figures for the trackers of a run, none of which is ever started here."""

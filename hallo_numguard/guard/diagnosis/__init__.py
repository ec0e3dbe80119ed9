"""Diagnosis of a bad step: from the observations of the ranks to a verdict."""

"""Manifests of folders in formats that other tools read too, and what has changed since they were written."""

"""Manifests of folders, in formats that other tools read too, and comparison with them."""

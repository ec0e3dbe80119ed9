"""What files should be: manifests of folders, in the formats that others read too, and what has changed since."""

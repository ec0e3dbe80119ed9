"""Other releases of DeepSpeed: what holds with each."""

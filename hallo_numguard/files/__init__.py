"""Dead weights: what files hold, whether they are whole, and whether a run can start from them."""

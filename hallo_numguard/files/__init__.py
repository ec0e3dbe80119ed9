"""Files of weights: what they hold, whether they are whole, and whether a run can start from them."""

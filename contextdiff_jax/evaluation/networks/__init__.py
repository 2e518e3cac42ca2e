"""Networks that metrics look through: Inception, LPIPS, CLIP, a classifier of the data set."""

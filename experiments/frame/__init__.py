"""What the scripts share: the loop of a run, what it learns with, its folder, rows and pictures."""

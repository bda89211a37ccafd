"""`make bench`: measurements, never tests. Each module here measures one thing and can be read for fairness on its own."""

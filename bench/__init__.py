"""Side-by-side measurements; each prints its figures beside a peer or a goal."""

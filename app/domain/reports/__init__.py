"""Reports: what was sold, as a read model fed by confirmed orders."""

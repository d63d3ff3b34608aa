"""Sessions: signing in, being recognised, signing out everywhere."""

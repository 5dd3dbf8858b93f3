"""Running machines."""

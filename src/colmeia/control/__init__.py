"""What a user may ask, and carrying it out. One file per noun; `operations` runs what takes long."""

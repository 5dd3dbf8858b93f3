"""The HTTP edge: parse, call control, render. One file per noun."""

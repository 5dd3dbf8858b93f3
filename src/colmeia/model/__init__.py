"""What exists: pure data, state tables and pure decisions. No I/O and no clock."""

"""QEMU driven directly over QMP: one unprivileged process per VM that outlives the daemon."""

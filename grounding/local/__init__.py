"""The local back end: one process a role on this machine, supervised, resumable. See docs/local.md."""

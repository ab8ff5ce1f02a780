"""The local back end: one supervised process per role on this machine. Runs can be resumed. See docs/local.md."""

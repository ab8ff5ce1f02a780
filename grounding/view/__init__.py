"""The live page of runs: a server on this machine that shows what is on the disk, drawn by the templates of the report."""

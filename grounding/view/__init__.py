"""The live page of runs: a server on this machine that shows the runs' files, rendered with the report's templates."""

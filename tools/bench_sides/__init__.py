"""What tools/bench.py measures: llmc and its peers, one file each, each run in a process (and environment) of its own."""

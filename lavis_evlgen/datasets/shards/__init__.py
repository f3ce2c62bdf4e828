"""Tar shards: names, reader, stream, writer, data set."""

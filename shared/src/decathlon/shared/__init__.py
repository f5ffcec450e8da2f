"""What the decathlon packages share: command lines, run directories, records, intervals, progress, figures."""

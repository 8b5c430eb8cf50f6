"""Sources and sinks: the file formats that merges read from and write to, one module or package a format."""

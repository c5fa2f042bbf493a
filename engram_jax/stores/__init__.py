"""Where rows live and how they are read: on the device, on the host, in a file.

store           the protocol, and what a read returns
program_stores  read by a compiled program: device, pinned host memory
host_stores     read on the host: host memory, a row file
row_cache       rows that are read often, kept on the device before a store
prefetch        threads that read ahead of the model
open_store      a store by a word such as `host` or `file:PATH`
quantization, row_files, row_file_headers, pinned    what these are made of
"""

"""Files in, files out: rows, records, and the engines that answer them.

Knows one or several engines, a server's process and Ray; not terminals or exit codes.
"""
